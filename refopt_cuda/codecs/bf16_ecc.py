"""bfloat16 weights and their error in parts of half a unit in the last place (FlashOptim, arXiv:2602.23349).

The half unit h is a power of two, 2^-134 at the least; its reciprocal is taken in two steps: 2^134 is no float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Weight, narrowed, widened

RANDOM = False
OPTIONS = {"bits": (8, 16)}
LEVELS = {8: np.float32(127), 16: np.float32(32767)}
MAGIC, MAGIC_BITS = np.float32(1.5 * 2**23), np.int32(0x4B400000)
EXPONENT, FIELD, ONE = np.uint32(0x7F80), np.uint32(7), np.uint32(1)
SHIFT, TOP, LAST = np.uint32(23), np.uint32(255), np.uint32(254)
TWO_7, TWO_MINUS_8 = np.float32(128), np.float32(2.0**-8)


def rest_dtype(bits: int = 8) -> np.dtype:
    """Of the errors."""
    return np.dtype(f"i{bits // 8}")


def make(o: Any, bits: int = 8) -> Weight:
    """`open(word, rest)` and `close(x, word, rest, r)`; r is not used."""
    mul, add, sub, word_of, real = o.mul, o.add, o.sub, o.bits, o.real
    value, rounded = widened(o), narrowed(o)
    levels, kept = LEVELS[bits], np.int8 if bits == 8 else np.int16
    part_of = np.float32(1) / levels

    @o.jit
    def exponent(word):
        return min(max(np.uint32(np.uint32(np.uint32(word) & EXPONENT) >> FIELD), ONE), LAST)

    @o.jit
    def open_(word, rest):
        half_unit = mul(real(np.uint32(exponent(word) << SHIFT)), TWO_MINUS_8)
        return add(value(word), mul(mul(np.float32(rest), part_of), half_unit))

    @o.jit
    def close(x, word, rest, r):
        p = rounded(x)
        if np.uint32(np.uint32(p) & EXPONENT) == EXPONENT:
            return p, kept(0)
        scale = real(np.uint32(np.uint32(TOP - exponent(p)) << SHIFT))
        part = mul(mul(sub(x, value(p)), scale), TWO_7)
        return p, kept(np.int32(word_of(add(mul(part, levels), MAGIC))) - MAGIC_BITS)

    return Weight(open_, close)
