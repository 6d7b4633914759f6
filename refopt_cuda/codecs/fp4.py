"""A 4-bit float for weights (bitsandbytes): three bits of magnitude, a sign, one absmax a block."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Block, absmax_scale
from refopt_cuda.codecs.nibbles import encode_table, finder

OPTIONS: dict[str, tuple[Any, ...]] = {}
BITS = 4
MAGNITUDES = (np.array([0, 1, 128, 192, 64, 96, 32, 48]) / 192).astype(np.float32)
"""By code, each rounded to float32 once; the codes are bit patterns, not ranks."""
VALUES = np.concatenate([MAGNITUDES, -MAGNITUDES])
NEGATIVE = 8
ZERO = np.float32(0)
RANK_BIT, ONE = np.uint8(2), np.uint8(1)


def dtype() -> np.dtype:
    """Two codes a byte."""
    return np.dtype(np.uint8)


def scale_dtype() -> np.dtype:
    """The absmax as it is."""
    return np.dtype(np.float32)


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """The values by code, and the encode table, which gives ranks of magnitudes, 8 more with a sign."""
    ranked = np.sort(MAGNITUDES)
    midpoints = (ranked[:-1] + ranked[1:]) * np.float32(0.5)
    return VALUES, encode_table((0, midpoints), (NEGATIVE, midpoints))


def make(o: Any) -> Block:
    """Codes 0 .. 15, uint8; a negative that rounds to zero is 8, a zero of either sign 0."""
    mul, add = o.mul, o.add
    values, table = tables()
    find = finder(o, table)

    @o.jit
    def stored(absmax):
        return absmax

    @o.jit
    def encode(x, factor):
        rank = find(add(mul(x, factor), ZERO))
        return np.uint8(rank ^ np.uint8(np.uint8(rank & RANK_BIT) << ONE))

    @o.jit
    def decode(code, scale):
        return mul(values[code], scale)

    return Block(absmax_scale(o, stored), encode, decode, np.uint8(0))
