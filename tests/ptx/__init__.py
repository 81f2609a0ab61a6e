"""Executes the PTX of the GPU kernels in NumPy, without a GPU: ``python -m tests.ptx --help``.

What Triton and nvcc emit runs through the project's launchers, every instruction of every thread,
and results are compared with float64. Checked beside them: every global access against its
allocation, alignment, bytes read before they were written (``cp.async`` delivers at its wait, not
before), races of warps and blocks, shuffles without all their lanes, barriers that some threads
never reach, and threads of a Triton block that branch apart.

What it cannot show: PTX is not SASS, so nothing of what ptxas makes of it, nor time. fma rounds
twice (once in 2^29 otherwise than hardware); mma and wgmma sum in float64 where tensor cores
truncate; wgmma runs at once, so a wait missing before its accumulators are read goes unnoticed.
"""
