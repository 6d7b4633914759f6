"""Companded 8-bit (arXiv:2602.23349): softsign or square root, then even steps; one 16-bit scale a block.

The factor of a block is the reciprocal of its stored scale, so that what was rounded away from the absmax is not
missing when it is decoded; where the scale became smaller, y is clamped to 1. A scale of 0 is a zero block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import LARGEST, TINY, Block

OPTIONS = {"signed": (True, False), "scale": ("f16", "bf16")}
BITS = 8
QUIET_NAN = {"f16": np.uint16(0x7E00), "bf16": np.uint16(0x7FC0)}
GREATEST = {"f16": np.uint32(0x7BFF), "bf16": np.uint32(0x7F7F)}
"""Words of the largest finite scales: a larger absmax takes these."""
MAGIC = np.float32(1.5 * 2**23)
MAGIC_BITS = np.int32(0x4B400000)
SIGN, INFINITY = np.uint32(0x80000000), np.uint32(0x7F800000)
MAGNITUDE = np.uint32(0x7FFFFFFF)
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
NO_WORD, ODD = np.uint16(0), np.uint32(1)

# float16: refopt_cuda/kernels/half.py says what each of these is
NORMAL, REBIAS, HALF_STEP, SHIFT = np.uint32(0x38800000), np.uint32(112 << 23), np.uint32(0x0FFF), np.uint32(13)
OVERFLOW = np.uint32(0x477FF000)
LADDER, LADDER_BITS, STEP = np.float32(0.5), np.uint32(0x3F000000), np.float32(2.0**-24)
WORD_MAGNITUDE, WORD_INFINITY, SUBNORMAL_END = np.uint32(0x7FFF), np.uint32(0x7C00), np.uint32(0x0400)
# bfloat16
UPPER, BF16_HALF_STEP = np.uint32(16), np.uint32(0x7FFF)


def dtype(signed: bool = True, scale: str = "f16") -> np.dtype:
    """-127 .. 127 with a sign, 0 .. 255 without."""
    return np.dtype(np.int8 if signed else np.uint8)


def scale_dtype(signed: bool = True, scale: str = "f16") -> np.dtype:
    """NumPy's float16, or words of bfloat16."""
    return np.dtype(np.float16 if scale == "f16" else np.uint16)


@cache
def tables(signed: bool = True, scale: str = "f16") -> tuple[np.ndarray, np.ndarray]:
    """What each byte decodes to beside scale 1 (without a sign: its root), float32; encoding needs no table."""
    q = np.arange(256).astype(np.int8 if signed else np.uint8).astype(np.float64)
    return (q / (254 - np.abs(q)) if signed else q / 255).astype(np.float32), np.empty(0, np.uint32)


def narrow(o: Any, scale: str) -> Callable:
    """`word(x)`: a positive finite float32 as a scale, uint32, nearest, ties to even, at most the largest."""
    bits, add, greatest = o.bits, o.add, GREATEST[scale]

    @o.jit
    def half(x):
        b = bits(x)
        odd = np.uint32(np.uint32(b >> SHIFT) & ODD)
        word = np.uint32(np.uint32(np.uint32(np.uint32(b + HALF_STEP) + odd) - REBIAS) >> SHIFT)
        if b < NORMAL:
            word = np.uint32(bits(add(x, LADDER)) - LADDER_BITS)
        return greatest if b >= OVERFLOW else word

    @o.jit
    def upper(x):
        b = bits(x)
        odd = np.uint32(np.uint32(b >> UPPER) & ODD)
        word = np.uint32(np.uint32(np.uint32(b + BF16_HALF_STEP) + odd) >> UPPER)
        return greatest if word > greatest else word

    return half if scale == "f16" else upper


def widen(o: Any, scale: str) -> Callable:
    """`value(word)`: the float32 number of a stored scale, which has no sign."""
    bits, real, mul = o.bits, o.real, o.mul

    @o.jit
    def half(word):
        m = np.uint32(np.uint32(word) & WORD_MAGNITUDE)
        wide = np.uint32(np.uint32(m << SHIFT) + REBIAS)
        if m < SUBNORMAL_END:
            wide = bits(mul(np.float32(np.int32(m)), STEP))
        if m >= WORD_INFINITY:
            wide = np.uint32(wide | INFINITY)
        return real(wide)

    @o.jit
    def upper(word):
        return real(np.uint32(np.uint32(word) << UPPER))

    return half if scale == "f16" else upper


def make(o: Any, signed: bool = True, scale: str = "f16") -> Block:
    """int8 codes -127 .. 127, or uint8 codes of a state that is never negative; scales are uint16 words."""
    mul, add, rcp, sqrt, bits, real, jit = o.mul, o.add, o.rcp, o.sqrt, o.bits, o.real, o.jit
    values = tables(signed, scale)[0]
    word, value, nan = narrow(o, scale), widen(o, scale), QUIET_NAN[scale]
    levels, code_type = np.float32(127 if signed else 255), np.int8 if signed else np.uint8

    @jit
    def measure(absmax_bits):
        if absmax_bits > LARGEST:
            return nan, ZERO, False
        if absmax_bits < TINY:
            return NO_WORD, ZERO, False
        absmax = real(absmax_bits)
        stored = np.uint16(word(absmax if signed else sqrt(absmax)))
        if stored == NO_WORD:
            return NO_WORD, ZERO, False
        return stored, rcp(value(stored)), True

    @jit
    def even(z):
        return code_type(np.int32(bits(add(mul(z, levels), MAGIC))) - MAGIC_BITS)

    @jit
    def encode_signed(x, factor):
        w = bits(mul(x, factor))
        y = real(np.uint32(w & MAGNITUDE))
        if y > ONE:
            y = ONE
        z = mul(mul(TWO, y), rcp(add(ONE, y)))
        return even(real(np.uint32(bits(z) | np.uint32(w & SIGN))))

    @jit
    def encode_unsigned(x, factor):
        y = mul(sqrt(x if x > ZERO else ZERO), factor)
        return even(ONE if y > ONE else y)

    @jit
    def decode_signed(code, stored):
        return mul(values[np.uint8(code)], value(stored))

    @jit
    def decode_unsigned(code, stored):
        w = mul(values[code], value(stored))
        return mul(w, w)

    if signed:
        return Block(measure, encode_signed, decode_signed, np.int8(0))
    return Block(measure, encode_unsigned, decode_unsigned, np.uint8(0))
