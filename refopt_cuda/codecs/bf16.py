"""bfloat16 words: the upper half of a float32, widened exactly and rounded once to nearest even."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Element

DTYPE = np.dtype(np.uint16)
MAGNITUDE = np.uint32(0x7FFFFFFF)
INFINITY = np.uint32(0x7F800000)
SIGN = np.uint32(0x8000)
QUIET_NAN = np.uint32(0x7FC0)
HALF = np.uint32(0x7FFF)
ONE = np.uint32(1)
SHIFT = np.uint32(16)


def make(o: Any) -> Element:
    """`load(word) -> x` and `store(x) -> word` over uint16 words."""
    bits, real = o.bits, o.real

    @o.jit
    def load(word):
        return real(np.uint32(np.uint32(word) << SHIFT))

    @o.jit
    def store(x):
        b = bits(x)
        upper = np.uint32(b >> SHIFT)
        if np.uint32(b & MAGNITUDE) > INFINITY:
            return np.uint16(QUIET_NAN | np.uint32(upper & SIGN))
        return np.uint16(np.uint32(np.uint32(b + HALF) + np.uint32(upper & ONE)) >> SHIFT)

    return Element(load, store)
