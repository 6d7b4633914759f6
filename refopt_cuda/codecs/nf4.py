"""4-bit NormalFloat (Dettmers et al., arXiv:2305.14314): sixteen published quantiles, one absmax a block."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Block, absmax_scale
from refopt_cuda.codecs.nibbles import FALLING, encode_table, finder

OPTIONS: dict[str, tuple[Any, ...]] = {}
BITS = 4
ZERO = 7
BELOW = [1.0, 0.6961928009986877, 0.5250730514526367, 0.39491748809814453, 0.28444138169288635]
BELOW += [0.18477343022823334, 0.09105003625154495]
ABOVE = [0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
ABOVE += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
VALUES = np.array([-v for v in BELOW] + [0.0] + ABOVE, np.float32)
"""The constants as they were published, exact in float32."""


def dtype() -> np.dtype:
    """Two codes a byte."""
    return np.dtype(np.uint8)


def scale_dtype() -> np.dtype:
    """The absmax as it is."""
    return np.dtype(np.float32)


@cache
def tables() -> tuple[np.ndarray, np.ndarray]:
    """The values and the encode table. A midpoint takes the lower index: below zero that is the larger magnitude, so
    the last word before it is the last that does not pass."""
    midpoints = (VALUES[:-1] + VALUES[1:]) * np.float32(0.5)
    negative = np.nextafter(-midpoints[:ZERO][::-1], np.float32(0))
    return VALUES, encode_table((ZERO, midpoints[ZERO:]), (FALLING - ZERO, negative))


def make(o: Any) -> Block:
    """Codes 0 .. 15, uint8, in ascending order of the values; 7 is zero."""
    mul = o.mul
    values, table = tables()
    find = finder(o, table)

    @o.jit
    def stored(absmax):
        return absmax

    @o.jit
    def encode(x, factor):
        return find(mul(x, factor))

    @o.jit
    def decode(code, scale):
        return mul(values[code], scale)

    return Block(absmax_scale(o, stored), encode, decode, np.uint8(ZERO))
