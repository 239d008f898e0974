"""Roundings that give the same bits on a GPU and in Triton's interpreter, whose own casts to bf16 and FP8 truncate.

No memory is touched here. PORTABLE forms work on the bits of fp32 and round to nearest, ties to even.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_a2a.kernels.signals import PORTABLE

_SMALLEST_AMAX = tl.constexpr(0x38D1B717)  # the bits of 1e-4


@triton.jit
def to_payload(value, DTYPE: tl.constexpr):
    """fp32 -> the payload dtype."""
    if PORTABLE and tl.bfloat16 == DTYPE:
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return value.to(DTYPE)


@triton.jit
def to_e4m3(value):
    """fp32, at most 448 in magnitude -> the byte of float8_e4m3fn. Not finite -> NaN."""
    if PORTABLE:
        bits = value.to(tl.uint32, bitcast=True)
        sign = (bits >> 24) & 0x80
        magnitude = bits & 0x7FFFFFFF
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
        # Below 2**-6 the codes are multiples of 2**-9; adding 2**23 makes fp32 round to them.
        tiny = tl.abs(value) * 512.0 + 8388608.0
        subnormal = tiny.to(tl.uint32, bitcast=True) & 0xF
        code = tl.where(magnitude < (121 << 23), subnormal, tl.minimum(normal, 0x7E))
        code = tl.where(magnitude >= 0x7F800000, 0x7F, code)
        return (code | sign).to(tl.uint8)
    else:
        return value.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def divide(value, scale, POW2: tl.constexpr):
    """value / scale in fp32, rounded to nearest, for the magnitudes that quantising meets. scale: > 0; POW2: a power of
    two. Not finite -> not finite or 0."""
    if PORTABLE:
        return tl.div_rn(value, scale)
    else:
        # One exact reciprocal a tile, and Markstein's correction an element: a third of a full division's instructions.
        reciprocal = tl.div_rn(1.0, scale)
        quotient = value * reciprocal
        if not POW2:  # otherwise it is exact already
            quotient = tl.fma(tl.fma(-quotient, scale, value), reciprocal, quotient)
        return quotient


@triton.jit
def power_of_two_at_least(scale):
    """The smallest power of two >= scale, for normal fp32 > 0, by its bits: log2 would round."""
    bits = scale.to(tl.int32, bitcast=True)
    up = ((bits & 0x7FFFFF) != 0).to(tl.int32)
    rounded = (((bits >> 23) + up) << 23).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, scale, rounded)


@triton.jit
def quantise(value, POW2: tl.constexpr):
    """fp32 [n, 128] -> (bytes of float8_e4m3fn [n, 128], fp32 scales [n]), as moe_a2a.fp8 does. A scale of values that
    are not finite is not finite."""
    # Magnitudes as integers are in the same order, and NaN is the largest: a maximum of floats would drop it.
    amax = tl.maximum(tl.max(value.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), _SMALLEST_AMAX)
    scale = tl.div_rn(amax.to(tl.float32, bitcast=True), 448.0)
    if POW2:
        scale = power_of_two_at_least(scale)
    return to_e4m3(divide(value, scale[:, None], POW2)), scale
