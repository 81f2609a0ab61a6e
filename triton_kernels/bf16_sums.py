"""Sums of products in bfloat16 by NVIDIA's tensor cores, each thread's of its own numbers.

A warp's ``mma.m16n8k8`` multiplies A [16, 8] by B [8, 8] and adds to C [16, 8]. Lane 4 g + t gives
rows g and g + 8 of A at columns 2 t and 2 t + 1, and has the same elements of C. With a diagonal B
no element of A meets another: C gets each times a number of its column. Here the columns 2 t are of
even rows of a tile of keys or queries, 2 t + 1 of odd ones, and B has the score gradients of one of
each, the same for all t. A thread's row g is of its first feature, row g + 8 of its second.
So four products are one instruction. A's numbers have to be finite: those of other columns are
multiplied by 0.
"""

import triton
import triton.language as tl


@triton.jit
def diagonal_share():
    """Which half of a word of two bfloat16 this lane gives of a diagonal B, as a mask of bits.

    Column n of B at rows 2 t and 2 t + 1 is that of lane 4 n + t.
    """
    lane = tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid; // $1", "=r,r", [0], tl.int32, is_pure=True, pack=1
    )
    column = lane // 4
    half = tl.where(column % 2 == 0, 0xFFFF, -0x10000)
    return tl.where(column // 2 == lane % 4, half, 0)


@triton.jit
def packed(even, odd):
    """An A of two features of an even and an odd row: two words of two bfloat16."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 first, second;
        cvt.rn.bf16x2.f32 first, $3, $1;
        cvt.rn.bf16x2.f32 second, $4, $2;
        mov.b64 $0, {first, second};
        }""",
        "=l,f,f,f,f",
        [even[0], even[1], odd[0], odd[1]],
        tl.int64,
        is_pure=True,
        pack=1,
    )


@triton.jit
def packed_slopes(h):
    """``h^2 - 1/4`` of each number in ``h``."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 first, second, minus_quarters;
        mov.b64 {first, second}, $1;
        mov.b32 minus_quarters, 0xBE80BE80;
        fma.rn.bf16x2 first, first, first, minus_quarters;
        fma.rn.bf16x2 second, second, second, minus_quarters;
        mov.b64 $0, {first, second};
        }""",
        "=l,l",
        [h],
        tl.int64,
        is_pure=True,
        pack=1,
    )


@triton.jit
def add_packed(sums, a, share):
    """``sums`` + ``a`` times a diagonal B, of which ``share`` is the lane's part.

    The sums are of the first feature in the even row and the odd one, then of the second.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 first, second;
        mov.b64 {first, second}, $4;
        mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32
            {$0, $1, $2, $3}, {first, second}, {$5}, {$6, $7, $8, $9};
        }""",
        "=f,=f,=f,=f,l,r,f,f,f,f",
        [a, share, sums[0], sums[1], sums[2], sums[3]],
        (tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )
