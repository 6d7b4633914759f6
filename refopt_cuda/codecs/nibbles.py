"""What the 4-bit codecs have in common: the nearest of sixteen values, found with one load.

A float32 whose upper 11 bits (sign, exponent, two bits of mantissa) are k lies in a bucket that holds at most one
midpoint between two codes, so one word a bucket is enough:

    E[k] = (code << 24) + 0xFFFFFF - (midpoint << 3 & 0xFFFFFF) - (k << 24)

Added to the word of y, shifted left by 3, it leaves the code in byte 3: the carry out of the low 24 bits is the
comparison |y| > midpoint. A code that falls as |y| grows is stored as its complement and marked with bit 7.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["FALLING", "encode_table", "finder"]

LAST = 0x3F800002
"""The largest |y| that a block has: 1 + 2^-22."""
FALLING = 0x8F
"""FALLING - c is the complement of code c, marked."""
SHIFT, KEY, BYTE = np.uint32(3), np.uint32(21), np.uint32(24)
MARK, COMPLEMENT, NIBBLE = np.uint32(0x80), np.uint32(0xFF), np.uint32(15)


def half(start: int, midpoints: np.ndarray) -> np.ndarray:
    """The 1024 buckets of one sign: `start` at zero, one more past each midpoint (float32, ascending, positive)."""
    words, buckets = midpoints.view(np.uint32).astype(np.int64), np.arange(1024)
    below = np.searchsorted(words >> 21, buckets)
    inside = np.searchsorted(words >> 21, buckets, side="right") - below
    if inside.max() > 1:
        raise AssertionError("two midpoints share a bucket of a 4-bit table")
    low = np.where(inside == 1, words[np.minimum(below, len(words) - 1)] << 3 & 0xFFFFFF, 0xFFFFFF)
    return (start + below << 24) + 0xFFFFFF - low - (buckets << 24)


def encode_table(plus: tuple[int, np.ndarray], minus: tuple[int, np.ndarray]) -> np.ndarray:
    """One uint32 a bucket, from (code of zero, midpoints of magnitudes) on either side of it."""
    return np.concatenate([half(*plus), half(*minus)[: (LAST >> 21) + 1]]).astype(np.uint32)


def finder(o: Any, table: np.ndarray) -> Callable:
    """`find(y) -> code`, uint8: one of 0 .. 15."""
    bits = o.bits

    @o.jit
    def find(y):
        w = bits(y)
        code = np.uint32(np.uint32(np.uint32(w << SHIFT) + table[np.uint32(w >> KEY)]) >> BYTE)
        if np.uint32(code & MARK) != np.uint32(0):
            code = np.uint32(code ^ COMPLEMENT)
        return np.uint8(np.uint32(code & NIBBLE))

    return find
