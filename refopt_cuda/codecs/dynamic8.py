"""Dynamic tree 8-bit codes (Dettmers, arXiv:1511.04561; Dettmers et al., arXiv:2110.02861), one absmax a block.

The nearest code of |y| in [0, 1] is found without a search. A float32 whose upper 16 bits are k lies in a bucket that
holds at most one midpoint between two codes, so one word a bucket is enough:

    E[k] = (code << 16) + 0xFFFF - (low half of the midpoint) - (k << 16)

Added to the word of |y| it leaves the code in byte 2: the carry out of the low half is the comparison.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Block, absmax_scale

OPTIONS = {"signed": (True, False)}
BITS = 8
SIGNED_ZERO = 127
FIRST_BUCKET, LAST_BUCKET = 0x3400, 0x3F80
"""Buckets from 2^-23, below the first midpoint of either table, to the one that starts at 1."""
SMALLEST = np.uint32(FIRST_BUCKET << 16)
MAGNITUDE = np.uint32(0x7FFFFFFF)
SIGN = np.uint32(0x80000000)
BYTE = np.uint32(0xFF)
SHIFT = np.uint32(16)
BASE = np.uint32(FIRST_BUCKET)
NO_SIGN, ZERO_WORD = np.uint32(0), np.uint32(SIGNED_ZERO)


@cache
def codebook(unsigned: bool) -> np.ndarray:
    """The 256 values in ascending order: exact rationals, each rounded once to float32."""
    values = {Fraction(0), Fraction(1)}
    for decade in range(7):
        cells = 2 ** (decade + unsigned)
        for j in range(cells):
            centre = (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 * cells)) / 10 ** (6 - decade)
            values |= {centre} if unsigned else {centre, -centre}
    return np.array(sorted(values), dtype=np.float64).astype(np.float32)


@cache
def midpoints(unsigned: bool) -> np.ndarray:
    """float32 midpoints between the neighbouring non-negative values; `|y| > midpoint[i]` counts towards the code."""
    values = codebook(unsigned)[0 if unsigned else SIGNED_ZERO :]
    return (values[:-1] + values[1:]) * np.float32(0.5)


@cache
def encode_table(unsigned: bool) -> np.ndarray:
    """One uint32 for each bucket `FIRST_BUCKET .. LAST_BUCKET`, as the head of this file describes."""
    words = midpoints(unsigned).view(np.uint32).astype(np.int64)
    buckets = np.arange(FIRST_BUCKET, LAST_BUCKET + 1)
    below = np.searchsorted(words >> 16, buckets)
    inside = np.searchsorted(words >> 16, buckets, side="right") - below
    if inside.max() > 1:
        raise AssertionError("two midpoints share a bucket of the dynamic8 table")
    low = np.where(inside == 1, words[np.minimum(below, len(words) - 1)] & 0xFFFF, 0xFFFF)
    return ((below << 16) + 0xFFFF - low - (buckets << 16)).astype(np.uint32)


def dtype(signed: bool = True) -> np.dtype:
    """Of the codes."""
    return np.dtype(np.uint8)


def scale_dtype(signed: bool = True) -> np.dtype:
    """Of the scales."""
    return np.dtype(np.float32)


def tables(signed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """What the CUDA functor looks up: the value of each code, and the words of the encode table."""
    return codebook(not signed), encode_table(not signed)


def make(o: Any, signed: bool = True) -> Block:
    """uint8 codes into the signed table, or into the unsigned one for a state that is never negative."""
    mul, bits, jit = o.mul, o.bits, o.jit
    values, table = tables(signed)

    @jit
    def stored(absmax):
        return absmax

    @jit
    def nearest(magnitude):
        word = max(magnitude, SMALLEST)
        bucket = np.uint32(np.uint32(word >> SHIFT) - BASE)
        return np.uint32(np.uint32(np.uint32(word + table[bucket]) >> SHIFT) & BYTE)

    @jit
    def encode_signed(x, factor):
        word = bits(mul(x, factor))
        code = nearest(np.uint32(word & MAGNITUDE))
        above, below = np.uint32(ZERO_WORD + code), np.uint32(ZERO_WORD - min(code, ZERO_WORD))
        return np.uint8(above if np.uint32(word & SIGN) == NO_SIGN else below)

    @jit
    def encode_unsigned(x, factor):
        word = bits(mul(x, factor))
        return np.uint8(nearest(word if np.uint32(word & SIGN) == NO_SIGN else SMALLEST))

    @jit
    def decode(code, scale):
        return mul(values[code], scale)

    encode = encode_signed if signed else encode_unsigned
    return Block(absmax_scale(o, stored), encode, decode, np.uint8(SIGNED_ZERO if signed else 0))
