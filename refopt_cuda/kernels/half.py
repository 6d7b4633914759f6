"""IEEE binary16 words, for weights and gradients held in float16: widened exactly, rounded once to nearest even."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Element

DTYPE = np.dtype(np.uint16)
MAGNITUDE = np.uint32(0x7FFFFFFF)
F32_INFINITY = np.uint32(0x7F800000)
OVERFLOW = np.uint32(0x477FF000)
"""Bits of 65520, half-way past the largest float16: from here on a float32 rounds to infinity."""
NORMAL = np.uint32(0x38800000)
"""Bits of 2^-14, the smallest normal float16."""
REBIAS = np.uint32((127 - 15) << 23)
HALF_STEP = np.uint32(0x0FFF)
QUIET_NAN, INFINITY, SUBNORMAL_END = np.uint32(0x7E00), np.uint32(0x7C00), np.uint32(0x0400)
WORD_MAGNITUDE, WORD_SIGN = np.uint32(0x7FFF), np.uint32(0x8000)
SHIFT, SIGN_SHIFT, ONE = np.uint32(13), np.uint32(16), np.uint32(1)
LADDER = np.float32(0.5)
"""Its unit in the last place is 2^-24, the step of float16's subnormals: adding it rounds to that step."""
LADDER_BITS = np.uint32(0x3F000000)
STEP = np.float32(2.0**-24)


def make(o: Any) -> Element:
    """`load(word) -> x` and `store(x) -> word` over uint16 words."""
    bits, real, mul, add = o.bits, o.real, o.mul, o.add

    @o.jit
    def load(word):
        w = np.uint32(word)
        sign = np.uint32(np.uint32(w & WORD_SIGN) << SIGN_SHIFT)
        magnitude = np.uint32(w & WORD_MAGNITUDE)
        wide = np.uint32(np.uint32(magnitude << SHIFT) + REBIAS)
        if magnitude >= INFINITY:
            wide = np.uint32(wide | F32_INFINITY)
        if magnitude < SUBNORMAL_END:
            wide = bits(mul(np.float32(np.int32(magnitude)), STEP))
        return real(np.uint32(wide | sign))

    @o.jit
    def store(x):
        b = bits(x)
        sign = np.uint32(np.uint32(b >> SIGN_SHIFT) & WORD_SIGN)
        magnitude = np.uint32(b & MAGNITUDE)
        odd = np.uint32(np.uint32(magnitude >> SHIFT) & ONE)
        word = np.uint32(np.uint32(np.uint32(np.uint32(magnitude + HALF_STEP) + odd) - REBIAS) >> SHIFT)
        if magnitude < NORMAL:
            word = np.uint32(bits(add(real(magnitude), LADDER)) - LADDER_BITS)
        if magnitude >= OVERFLOW:
            word = INFINITY
        if magnitude > F32_INFINITY:
            word = QUIET_NAN
        return np.uint16(word | sign)

    return Element(load, store)
