"""The three shapes a codec's scalar form takes; the block scale and the bfloat16 words that codecs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = ["TINY", "Block", "Element", "Weight", "absmax_scale", "narrowed", "widened"]

TINY = np.uint32((127 - 100) << 23)
"""Bits of 2^-100: a block whose absmax lies below is a zero block."""
LARGEST = np.uint32(0x7F7FFFFF)
ZERO = np.float32(0)
NAN = np.float32("nan")


class Element(NamedTuple):
    """A codec without a scale: `load(code) -> float32` and `store(float32) -> code`."""

    load: Callable
    store: Callable


class Block(NamedTuple):
    """A codec with one scale a block.

    scale(absmax_bits)   bits of the block's absmax, uint32 -> (stored scale, factor onto [-1, 1], whether it is coded)
    encode(x, factor)    element, and that factor of its block -> code
    decode(code, scale)  code and stored scale -> float32
    zero                 code of zero, which fills a block that is not coded
    """

    scale: Callable
    encode: Callable
    decode: Callable
    zero: Any


class Weight(NamedTuple):
    """A format of weights: bfloat16 words that a model sees, and perhaps a rest of 8 or 16 bits beside each.

    open(word, rest)         the weight that the rule steps, float32
    close(x, word, rest, r)  x stored anew, over the old word and rest, with 16 random bits -> (word, rest)
    """

    open: Callable
    close: Callable


def absmax_scale(o: Any, stored: Callable) -> Callable:
    """The `scale` of a block codec that stores `stored(absmax)`; 0 for a zero block, NaN for one with NaN or Inf."""
    real, rcp = o.real, o.rcp

    @o.jit
    def scale(absmax_bits):
        if absmax_bits > LARGEST:
            return NAN, ZERO, False
        if absmax_bits < TINY:
            return ZERO, ZERO, False
        absmax = real(absmax_bits)
        return stored(absmax), rcp(absmax), True

    return scale


MAGNITUDE, INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
SIGN, QUIET_NAN, HALF = np.uint32(0x8000), np.uint32(0x7FC0), np.uint32(0x7FFF)
SHIFT, ONE = np.uint32(16), np.uint32(1)


def widened(o: Any) -> Callable:
    """`value(word) -> x`: the float32 of a bfloat16 word."""
    real = o.real

    @o.jit
    def value(word):
        return real(np.uint32(np.uint32(word) << SHIFT))

    return value


def narrowed(o: Any) -> Callable:
    """`word(x)`: the nearest bfloat16, ties to even; NaN becomes the quiet NaN of its sign."""
    bits = o.bits

    @o.jit
    def word(x):
        b = bits(x)
        upper = np.uint32(b >> SHIFT)
        if np.uint32(b & MAGNITUDE) > INFINITY:
            return np.uint16(QUIET_NAN | np.uint32(upper & SIGN))
        return np.uint16(np.uint32(np.uint32(b + HALF) + np.uint32(upper & ONE)) >> SHIFT)

    return word
