"""By which formula a tile is computed: the thresholds, most of them those of ``csrc/route.h``.

A tile is factored if nothing speaks against it, else it takes tanh of each sum q + k.
"""

import triton
import triton.language as tl

# Exponents 2 log2(e) |q| up to 31 keep x0 x1 < 2^126, so that its reciprocal is a normal number.
# The CPU's form, which multiplies by score weights before it divides, stays within 27.
LARGEST_MAGNITUDE = tl.constexpr(31 * 0.6931471805599453 / 2)
# The largest root of sum w^2 for which scores are factored: errors of tanh, other ones for each
# key, add up to about that times epsilon, which the softmax would show.
LARGEST_WEIGHT_NORM = tl.constexpr(16.0)
# Of |sum w|, in roots of sum w^2 (weights of random signs hardly exceed it, equal ones do): sums of
# fractions grow to half of it, and so do their roundings, however small the scores are.
LARGEST_WEIGHT_SUM = tl.constexpr(3.5)
# Below these sums of magnitudes tanh is so small that the fractions' absolute error would show: in
# scores, and in the gradient of score weights, which is a sum of tanh.
SMALLEST_MAGNITUDE_SUM = tl.constexpr(0.25)
SMALLEST_GRADIENT_SUM = tl.constexpr(0.5)
# And in gradients of bfloat16, to which score gradients are rounded.
SMALLEST_ROUGH_SUM = tl.constexpr(1e-4)
# |q + k| up to which tanh counts as nearly 0, and from which as nearly 1.
SMALL_MAGNITUDE = tl.constexpr(0.25)
SATURATED_MAGNITUDE = tl.constexpr(1.0)
# The part of sum |w| that has to meet a tanh between the two. C++ and CUDA ask for an eighth, but
# count a feature for which a pair of any query and any key of the tile might; here it is pairs that
# are looked at, and fewer of them meet.
INFORMATIVE_SHARE = tl.constexpr(1 / 32)

# Of scores that are returned, the least that the largest of a tile may be in roots of sum w^2: the
# fractions' absolute error, up to 4e-7 of that root, has to be less than a millionth of the score.
LEAST_SCORE = tl.constexpr(0.5)

# Slopes 1 - tanh^2 below count as 0, as they are in double precision: csrc/arithmetic.h.
VANISHING_SLOPE = tl.constexpr(2.0**-53)


@triton.jit
def in_factored_range(query_bound, key_bound, SMALLEST_SUM: tl.constexpr):
    """Whether rows with these largest magnitudes may meet in the factored form; NaN: no."""
    small_enough = (query_bound <= LARGEST_MAGNITUDE) & (key_bound <= LARGEST_MAGNITUDE)
    return small_enough & (query_bound + key_bound >= SMALLEST_SUM)
