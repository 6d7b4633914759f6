"""4-bit states (Li et al., arXiv:2309.01507), one absmax a block: a dynamic map with a sign, k / 16 without."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Block, absmax_scale
from refopt_cuda.codecs.nibbles import FALLING, encode_table, finder

OPTIONS = {"signed": (True, False)}
BITS = 4
SIGNED_ZERO = 7
MAGIC = np.float32(1.5 * 2**19)
"""Adding it rounds a float32 to the nearest even sixteenth, and leaves how many there are in the low bits."""
MAGIC_BITS = np.uint32(0x49400000)
LEAST = np.float32(1 / 16)
ONE = np.uint32(1)


def dtype(signed: bool = True) -> np.dtype:
    """Two codes a byte."""
    return np.dtype(np.uint8)


def scale_dtype(signed: bool = True) -> np.dtype:
    """The absmax as it is."""
    return np.dtype(np.float32)


@cache
def codebook(signed: bool) -> np.ndarray:
    """The 16 values in ascending order: exact rationals, each rounded once to float32."""
    if not signed:
        return (np.arange(1, 17) / 16).astype(np.float32)
    values = {Fraction(0), Fraction(1)}
    for decade in range(3):
        cells = 2**decade
        for j in range(cells):
            centre = (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 * cells)) / 10 ** (2 - decade)
            values |= {centre, -centre}
    return np.array(sorted(values), dtype=np.float64).astype(np.float32)


@cache
def tables(signed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The signed values and their encode table; the unsigned levels need none."""
    if not signed:
        return np.empty(0, np.float32), np.empty(0, np.uint32)
    values = codebook(True)
    midpoints = (values[SIGNED_ZERO:-1] + values[SIGNED_ZERO + 1 :]) * np.float32(0.5)
    falling = (FALLING - SIGNED_ZERO, midpoints[:SIGNED_ZERO])  # there is no -1: code 0 is the last
    return values, encode_table((SIGNED_ZERO, midpoints), falling)


def make(o: Any, signed: bool = True) -> Block:
    """Codes 0 .. 15, uint8, into the table of sixteen values."""
    mul, add, bits, jit = o.mul, o.add, o.bits, o.jit
    values = codebook(signed)

    @jit
    def stored(absmax):
        return absmax

    @jit
    def decode(code, scale):
        return mul(values[code], scale)

    if not signed:

        @jit
        def encode(x, factor):
            y = mul(x, factor)
            if y < LEAST:
                y = LEAST
            return np.uint8(np.uint32(np.uint32(bits(add(y, MAGIC)) - MAGIC_BITS) - ONE))

        return Block(absmax_scale(o, stored), encode, decode, np.uint8(0))

    find = finder(o, tables(True)[1])

    @jit
    def encode_signed(x, factor):
        return find(mul(x, factor))

    return Block(absmax_scale(o, stored), encode_signed, decode, np.uint8(SIGNED_ZERO))
