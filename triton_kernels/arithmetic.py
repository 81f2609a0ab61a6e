"""The arithmetic that all kernels share: tanh factored and direct, softmax weights, dropout.

With ``A = exp(2q)``, ``B = exp(2k)``, ``x = 1 + A B`` and ``r = 1 / x``, ``tanh(q + k) = 1 - 2r``
and its derivative is ``4 (r - r^2)``. Two features are a pair: their fractions share
one reciprocal, ``w0 r0 + w1 r1 = (w0 x1 + w1 x0) / (x0 x1)``.
"""

import triton
import triton.language as tl

# The interpreter multiplies matrices of 16-bit floats by their bits.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def reciprocal(x, USE_PTX: tl.constexpr):
    """``1 / x`` to one unit in the last place, for normal x with a normal reciprocal, and inf."""
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def as_float32(x, USE_PTX: tl.constexpr):
    """x in float32, converted in the layout that it was loaded in.

    A plain conversion lets Triton 3.6 exchange the narrower 16-bit rows between threads instead,
    each of which would then compute the exponentials of all rows that it meets.
    """
    if USE_PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{ .reg .b16 zero; mov.b16 zero, 0; mov.b32 $0, {zero, $1}; }",
            "=f,h",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    elif USE_PTX and x.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "cvt.f32.f16 $0, $1;", "=f,h", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return x.to(tl.float32)


@triton.jit
def exp_twice(x, REFINE: tl.constexpr):
    """``exp(2x)``; ``REFINE`` makes up for the rounding of the exponent of base 2."""
    exponent = x * (2 * LOG2_E)
    result = tl.exp2(exponent)
    if REFINE:
        result += result * tl.fma(exponent, -LN_2, x + x)
    return result


@triton.jit
def exp_once(x, USE_PTX: tl.constexpr):
    """``exp(x)``, 0 where that is below the normal numbers.

    By each of the threads that an element is spread to, not by all that will need the result.
    """
    if USE_PTX:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 y; mul.f32 y, $1, 0f3FB8AA3B; ex2.approx.ftz.f32 $0, y; }",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    else:
        return tl.exp(x)


@triton.jit
def tanh_and_derivative(x, EXACT: tl.constexpr, USE_PTX: tl.constexpr):
    """``tanh(x)`` and ``1 - tanh(x)^2`` for any x.

    Without ``EXACT`` both err by some units of 2^-24 however small they are; with it the errors are
    relative.
    """
    if EXACT:
        magnitude = tl.abs(x)
        decay = exp_twice(-magnitude, True)
        fraction = reciprocal(1.0 + decay, USE_PTX)
        square = x * x  # the series of tanh up to x^15, for |x| < 1/2
        series = square * -0.0014558343870513183 + 0.003592128036572481
        series = square * series - 0.008863235529902197
        series = square * series + 0.021869488536155203
        series = square * series - 0.05396825396825397
        series = square * series + 0.13333333333333333
        series = square * series - 0.3333333333333333
        small = x + x * (square * series)
        large = (1.0 - decay) * fraction
        large = tl.where(x < 0, -large, large)
        part = decay * fraction  # of the slope p (1 - p), to which errors of p = 1/2 are nothing
        return tl.where(magnitude < 0.5, small, large), 4.0 * tl.fma(-part, part, part)
    else:
        r = reciprocal(1.0 + tl.exp2(x * (2 * LOG2_E)), USE_PTX)
        return 1.0 - 2.0 * r, 4.0 * (r - r * r)


@triton.jit
def factored_pair(a0, a1, b0, b1, USE_PTX: tl.constexpr):
    """``h = r - 1/2`` of two features from one reciprocal; ``tanh = -2 h``."""
    x0 = a0 * b0 + 1.0
    x1 = a1 * b1 + 1.0
    both = reciprocal(x0 * x1, USE_PTX)
    return tl.fma(x1, both, -0.5), tl.fma(x0, both, -0.5)


@triton.jit
def add_weighted_pair(sums, a0, a1, b0, b1, w0, w1, USE_PTX: tl.constexpr):
    """``sums + w0 r0 + w1 r1``."""
    if USE_PTX:
        # As one, since the assembler spilled registers where those of several pairs were mixed.
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 x0, x1, n;
            fma.rn.f32 x0, $2, $4, 0f3F800000;
            fma.rn.f32 x1, $3, $5, 0f3F800000;
            mul.f32 n, $7, x0;
            fma.rn.f32 n, $6, x1, n;
            mul.f32 x0, x0, x1;
            rcp.approx.ftz.f32 x0, x0;
            fma.rn.f32 $0, n, x0, $1;
            }""",
            "=f,f,f,f,f,f,f,f",
            [sums, a0, a1, b0, b1, w0, w1],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        x0 = a0 * b0 + 1.0
        x1 = a1 * b1 + 1.0
        return sums + (w0 * x1 + w1 * x0) * reciprocal(x0 * x1, USE_PTX)


@triton.jit
def add_product(sums, x, y):
    """``sums + x y`` for a sum over threads, of which all then get the same.

    A product that is left to the first addition between two threads is fused into it: each would
    add its own unrounded product to the other's rounded one. On some such sums threads branch.
    """
    return tl.fma(x, y, sums)


@triton.jit
def product(left, right, sums=None):
    """``sums + left @ right`` of two matrices of one dtype, summed in float32."""
    if INTERPRETED:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, sums, input_precision="ieee")


@triton.jit
def weighted_sum(weights, value, sums=None):
    """``sums + weights @ value``; where values have 16 bits, float32 weights come in two parts."""
    if value.dtype == tl.float32:
        return product(weights, value, sums)
    else:
        high = weights.to(value.dtype)
        low = (weights - high.to(tl.float32)).to(value.dtype)
        return product(high, value, product(low, value, sums))


@triton.jit
def kept_weights(dropout, sequence, head, query, key):
    """What :class:`rows.Dropout` multiplies weights of a sequence and head by, or 1 for all.

    ``query``, ``key``: positions in the sequence, broadcast against each other.
    """
    if dropout is None:
        return 1.0
    else:
        query, key = tl.broadcast(query.to(tl.int32), key.to(tl.int32))
        head = query * 0 + head.to(tl.int32)
        sequence = query * 0 + sequence
        word, _, _, _ = tl.philox(tl.load(dropout.seed_ptr), key, query, head, sequence)
        threshold = tl.cast(dropout.threshold, tl.int32)
        return tl.where((word >> 8).to(tl.int32) >= threshold, dropout.scale, 0.0)
