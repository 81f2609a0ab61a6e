"""Triton kernels and their launchers, installed as ``attn_ext.triton_kernels``.

Importing this package imports no Triton: each module of kernels does that for itself.
"""
