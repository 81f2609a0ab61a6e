"""What generated code calls of arithmetic: instructions that are more than one NumPy ufunc.

float32 is IEEE; fma rounds the exact product plus addend to float64, then to float32, which shows
once in 2^29.
"""

import numpy as np

f4, f8, i4, i8, u1, u2, u4, u8 = (
    np.float32, np.float64, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64,
)  # fmt: skip
UNSIGNED = {1: u1, 2: u2, 4: u4, 8: u8}


def put(target, value, m):
    if m is None:
        target[...] = value
    else:
        np.copyto(target, value, where=m, casting="unsafe")


def spread(target, values, signed: bool, m):
    """Loaded values of the threads in m; narrower ones are extended."""
    if values.dtype.itemsize != target.dtype.itemsize:
        if signed:
            values = values.view(f"i{values.dtype.itemsize}")
        raw = target.view(f"u{target.dtype.itemsize}")
        values = (
            values.astype(f"i{target.dtype.itemsize}").view(raw.dtype)
            if signed
            else values.astype(raw.dtype)
        )
    raw = target.view(values.dtype)
    if m is None:
        raw[...] = values
    else:
        raw[m] = values


def flush(x):
    """Subnormal float32 to zero of its sign."""
    x = np.asarray(x, f4)
    return np.where(np.abs(x) < f4(1.1754944e-38), np.copysign(f4(0), x), x)


def fma_f32(a, b, c, target, m):
    t = np.multiply(a, b, dtype=f8)
    t = np.add(t, c, dtype=f8)
    if m is None:
        target[...] = t
    else:
        np.copyto(target, t, where=m, casting="same_kind")


def fma_down(a, b, c):
    """Towards minus infinity."""
    exact = np.add(np.multiply(a, b, dtype=f8), c, dtype=f8)
    near = exact.astype(f4)
    return np.where(near > exact, np.nextafter(near, f4(-np.inf)), near)


def saturate(x):
    return np.where(np.isnan(x), f4(0), np.clip(x, f4(0), f4(1)))


def fma_f64(a, b, c, target, m):
    put(target, (a.astype(np.longdouble) * b + c).astype(f8), m)


def unordered(compare, a, b):
    return compare(a, b) | np.isnan(a) | np.isnan(b)


def ordered(compare, a, b):
    return compare(a, b) & ~np.isnan(a) & ~np.isnan(b)


# ---- Integers ----


def mulhi_u32(a, b):
    return (np.multiply(a, b, dtype=u8) >> u8(32)).astype(u4)


def mulhi_s32(a, b):
    return (np.multiply(a, b, dtype=i8) >> i8(32)).astype(i4)


def mulhi_u64(a, b):
    a, b = np.asarray(a, u8), np.asarray(b, u8)
    low, half = u8(0xFFFFFFFF), u8(32)
    al, ah, bl, bh = a & low, a >> half, b & low, b >> half
    cross = (al * bl >> half) + (ah * bl & low) + al * bh
    return ah * bh + (ah * bl >> half) + (cross >> half)


def mulhi_s64(a, b):
    a, b = np.asarray(a, i8), np.asarray(b, i8)
    high = mulhi_u64(a.view(u8), b.view(u8)).view(i8)
    return high - np.where(a < 0, b, 0) - np.where(b < 0, a, 0)


def div_int(a, b):
    """Towards zero."""
    a, b = np.broadcast_arrays(a, b)
    if a.dtype.kind == "u":
        return a // np.where(b == 0, 1, b).astype(a.dtype)
    b = np.where(b == 0, 1, b).astype(a.dtype)
    quotient = a // b
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype)


def rem_int(a, b):
    return a - div_int(a, b) * b


def shl(a, n):
    width = 8 * a.dtype.itemsize
    raw = np.asarray(a).view(UNSIGNED[a.dtype.itemsize])
    n = np.minimum(n, width).astype(raw.dtype)
    return np.where(n >= width, raw * 0, raw << np.minimum(n, raw.dtype.type(width - 1))).view(
        a.dtype
    )


def shr(a, n):
    width = 8 * a.dtype.itemsize
    n = np.minimum(n, width)
    by = np.minimum(n, width - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return a >> by
    return np.where(n >= width, a * 0, a >> by)


def _funnel(a, b):
    return np.asarray(b, u8) << u8(32) | np.asarray(a, u8)


def shf_l_wrap(a, b, n):
    return (_funnel(a, b) << (np.asarray(n, u8) & u8(31)) >> u8(32)).astype(u4)


def shf_r_wrap(a, b, n):
    return (_funnel(a, b) >> (np.asarray(n, u8) & u8(31))).astype(u4)


def shf_l_clamp(a, b, n):
    return (_funnel(a, b) << np.minimum(n, 32).astype(u8) >> u8(32)).astype(u4)


def shf_r_clamp(a, b, n):
    return (_funnel(a, b) >> np.minimum(n, 32).astype(u8)).astype(u4)


def bfe(a, position, length):
    a = np.asarray(a)
    width = 8 * a.dtype.itemsize
    position, length = (np.asarray(x).astype(i8) & 255 for x in (position, length))
    raw = a.view(UNSIGNED[a.dtype.itemsize])
    shifted = shr(raw, np.asarray(position, u4))
    mask = np.where(length >= width, -1, (1 << np.minimum(length, width - 1)) - 1)
    value = shifted & mask.astype(raw.dtype)
    if a.dtype.kind == "i":
        last = np.minimum(position + length - 1, width - 1)
        sign = shr(raw, np.asarray(np.maximum(last, 0), u4)) & raw.dtype.type(1)
        value = np.where((length > 0) & (sign == 1), value | ~mask.astype(raw.dtype), value)
        to_the_top = shr(a, np.asarray(position, u4)).view(raw.dtype)
        value = np.where((length > 0) & (position + length >= width), to_the_top, value)
    return value.view(a.dtype)


def bfi(a, b, position, length):
    position, length = (np.asarray(x).astype(u8) & u8(255) for x in (position, length))
    mask = ((u8(1) << np.minimum(length, u8(32))) - u8(1)) << np.minimum(position, u8(32))
    mask = mask.astype(u4)
    return (np.asarray(b) & ~mask) | (
        (np.asarray(a, u8) << np.minimum(position, u8(32))).astype(u4) & mask
    )


def popc(a):
    return np.bitwise_count(a).astype(u4)


def clz(a):
    a = np.asarray(a)
    width = 8 * a.dtype.itemsize
    raw = a.view(UNSIGNED[a.dtype.itemsize]).astype(u8)
    out = np.full(raw.shape, width, u4)
    for n in range(width):
        out = np.where(raw >> u8(n) & u8(1), width - 1 - n, out)
    return out.astype(u4)


def brev(a):
    out = np.zeros_like(a)
    for n in range(32):
        out |= (a >> u4(n) & u4(1)) << u4(31 - n)
    return out


def prmt(a, b, selector):
    both = np.asarray(b, u8) << u8(32) | np.asarray(a, u8)
    out = 0
    for n in range(4):
        s = np.asarray(selector, u8) >> u8(4 * n)
        byte = both >> ((s & u8(7)) * u8(8)) & u8(0xFF)
        sign = np.where(byte >> u8(7), u8(0xFF), u8(0))
        out = out | np.where(s >> u8(3) & u8(1), sign, byte) << u8(8 * n)
    return out.astype(u4)


def lop3(a, b, c, table):
    out = 0
    for n in range(8):
        if table >> n & 1:
            out = out | (a if n & 4 else ~a) & (b if n & 2 else ~b) & (c if n & 1 else ~c)
    return out if table else np.zeros_like(a)


def pack(size, *parts):
    wide = UNSIGNED[size * len(parts) // 8]
    out = 0
    for n, part in enumerate(parts):
        part = np.asarray(part)
        raw = part.view(UNSIGNED[part.dtype.itemsize]).astype(wide)
        out = out | raw << wide(n * size)
    return out


def part_of(whole, number, size):
    whole = np.asarray(whole)
    raw = whole.view(UNSIGNED[whole.dtype.itemsize])
    return (raw >> raw.dtype.type(number * size)).astype(UNSIGNED[size // 8])


# ---- Floats ----


def from_bf16(bits):
    return (np.asarray(bits, u4) << u4(16)).view(f4)


def from_f16(bits):
    return np.ascontiguousarray(bits, u2).view(np.float16)


def to_bf16(x):
    bits = np.ascontiguousarray(x, f4).view(u4)
    rounded = (bits + u4(0x7FFF) + (bits >> u4(16) & u4(1))) >> u4(16)
    return np.where(np.isnan(x), u4(0x7FFF), rounded).astype(u2)


def to_f16(x):
    with np.errstate(over="ignore"):
        rounded = np.asarray(x).astype(np.float16).view(u2)
    return np.where(np.isnan(x), u2(0x7FFF), rounded)


def fma_bf16x2(a, b, c):
    """Of both halves, rounded to float32 and then to bfloat16."""
    halves = []
    for shift in (u4(0), u4(16)):
        x, y, z = (from_bf16(bits >> shift & u4(0xFFFF)).astype(f8) for bits in (a, b, c))
        halves.append(to_bf16((x * y + z).astype(f4)).astype(u4))
    return halves[0] | halves[1] << u4(16)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def round_float(x, rounding):
    return ROUNDINGS[rounding](x)


def to_int(x, rounding, dtype):
    """Saturating; NaN is 0."""
    info = np.iinfo(dtype)
    x = ROUNDINGS[rounding](np.asarray(x, f8))
    out = np.clip(x, float(info.min), float(info.max))
    big = x >= float(info.max)
    return np.where(big, info.max, np.where(np.isnan(out) | big, 0, out).astype(dtype))


class Approximate:
    """Instructions of a documented error: the correctly rounded result, or one off by up to that.

    ``noise`` says which; the error is drawn from the result, so that equal ones err alike.
    """

    def __init__(self, noise: bool):
        self.noise = noise

    def _inexact(self, value, error: float):
        """float64 to float32, off by a part of a relative error."""
        if self.noise:
            mixed = np.asarray(value, f4).view(u4).astype(u8) * u8(0x9E3779B97F4A7C15)
            part = ((mixed >> u8(32)) & u8(0xFFFFFF)).astype(f8) / 0x7FFFFF - 1
            value = value * (1 + error * part)
        return value.astype(f4)

    def ex2(self, x, ftz: bool):
        out = self._inexact(np.exp2(np.asarray(flush(x) if ftz else x, f8)), 2.0**-22.5)
        return flush(out) if ftz else out

    def rcp(self, x, ftz: bool):
        out = self._inexact(1 / np.asarray(flush(x) if ftz else x, f8), 2.0**-23)
        return flush(out) if ftz else out

    def rcp_exact(self, x, ftz: bool):
        return (1 / np.asarray(x, f8)).astype(f4)

    def lg2(self, x, ftz: bool):
        return self._inexact(np.log2(np.asarray(flush(x) if ftz else x, f8)), 2.0**-22)

    def sqrt32(self, x, ftz: bool):
        return self._inexact(np.sqrt(np.asarray(x, f8)), 0)

    def rsqrt32(self, x, ftz: bool):
        return self._inexact(1 / np.sqrt(np.asarray(x, f8)), 2.0**-22.4)

    def tanh32(self, x, ftz: bool):
        return self._inexact(np.tanh(np.asarray(x, f8)), 2.0**-11)

    def div_approx(self, a, b, ftz: bool):
        a, b = (flush(x) if ftz else x for x in (a, b))
        return self._inexact(np.asarray(a, f8) / np.asarray(b, f8), 2.0**-22)
