"""8-bit floats (Micikevicius et al., arXiv:2209.05433), e4m3 or e5m2, one scale a block: absmax / the largest number.

A word's fields lie in the order of float32's: moved to their place they give the number but for the bias, which a
multiplication mends, subnormals included. The way back rounds on the word; below the normal range, where steps are
even, by adding a number whose steps are the same. |y| is at most 1 + 2^-22, which rounds to the largest: no clamp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Block, absmax_scale

OPTIONS = {"format": ("e4m3", "e5m2")}
BITS = 8
FIELDS = {"e4m3": (3, 7, 448.0, 0x7E), "e5m2": (2, 15, 57344.0, 0x7B)}
"""(bits of mantissa, bias, largest number, its word)."""
BYTE_SIGN, BYTE_MAGNITUDE = np.uint32(0x80), np.uint32(0x7F)
SIGN, MAGNITUDE, NOT_FINITE = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
UP, ONE = np.uint32(24), np.uint32(1)


def dtype(format: str = "e4m3") -> np.dtype:
    """Words of eight bits."""
    return np.dtype(np.uint8)


def scale_dtype(format: str = "e4m3") -> np.dtype:
    """One float32 a block."""
    return np.dtype(np.float32)


def tables(format: str = "e4m3") -> tuple[np.ndarray, np.ndarray]:
    """None: words are computed, or converted by the hardware."""
    return np.empty(0, np.float32), np.empty(0, np.uint32)


def power(exponent: int) -> np.float32:
    return np.float32(2.0**exponent)


def make(o: Any, format: str = "e4m3") -> Block:
    """uint8 words with a sign bit; every word decodes, those that are not finite too."""
    mul, add, bits, real, jit = o.mul, o.add, o.bits, o.real, o.jit
    mantissa, bias, greatest, last = FIELDS[format]
    largest, top = np.float32(greatest), np.uint32(last)
    shift, rebias = np.uint32(23 - mantissa), power(127 - bias)
    normal, ladder = power(1 - bias).view(np.uint32), power(24 - bias - mantissa)
    steps, half = ladder.view(np.uint32), np.uint32((1 << (22 - mantissa)) - 1)
    first = np.uint32((127 - bias) << mantissa)

    @jit
    def stored(absmax):
        return absmax / largest

    @jit
    def encode(x, factor):
        w = bits(mul(mul(x, factor), largest))
        m = np.uint32(w & MAGNITUDE)
        odd = np.uint32(np.uint32(m >> shift) & ONE)
        code = np.uint32(np.uint32(np.uint32(np.uint32(m + half) + odd) >> shift) - first)
        if m < normal:
            code = np.uint32(bits(add(real(m), ladder)) - steps)
        return np.uint8(np.uint32(code | np.uint32(np.uint32(w & SIGN) >> UP)))

    @jit
    def decode(code, scale):
        w = np.uint32(code)
        m = np.uint32(w & BYTE_MAGNITUDE)
        x = bits(mul(real(np.uint32(m << shift)), rebias))
        if m > top:
            x = np.uint32(x | NOT_FINITE)
        return mul(real(np.uint32(x | np.uint32(np.uint32(w & BYTE_SIGN) << UP))), scale)

    return Block(absmax_scale(o, stored), encode, decode, np.uint8(0))
