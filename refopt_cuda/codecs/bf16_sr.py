"""bfloat16 weights, rounded by chance (Gupta et al., arXiv:1502.02551, section 3): 16 random bits below the word."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Weight, widened

RANDOM = True
MAGNITUDE, INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
SIGN, QUIET_NAN, SHIFT = np.uint32(0x8000), np.uint32(0x7FC0), np.uint32(16)


def rest_dtype() -> None:
    """Nothing lies beside the words."""
    return None


def make(o: Any) -> Weight:
    """`open(word, rest)` and `close(x, word, rest, r)`; the rest comes back as it was."""
    bits, value = o.bits, widened(o)

    @o.jit
    def open_(word, rest):
        return value(word)

    @o.jit
    def close(x, word, rest, r):
        b = bits(x)
        if np.uint32(b & MAGNITUDE) > INFINITY:
            return np.uint16(QUIET_NAN | np.uint32(np.uint32(b >> SHIFT) & SIGN)), rest
        return np.uint16(np.uint32(b + np.uint32(r)) >> SHIFT), rest

    return Weight(open_, close)
