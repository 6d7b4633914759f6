"""bfloat16 weights and the 16 bits that they lack (Transformer Engine's parameter remainders): lossless."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Weight

RANDOM = False
MAGNITUDE, INFINITY = np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
QUIET_NAN, HALF, LOW, SHIFT = np.uint32(0x7FC00000), np.uint32(0x8000), np.uint32(0xFFFF), np.uint32(16)


def rest_dtype() -> np.dtype:
    """Of the remainders."""
    return np.dtype(np.int16)


def make(o: Any) -> Weight:
    """`open(word, rest)` and `close(x, word, rest, r)`; r is not used."""
    bits, real = o.bits, o.real

    @o.jit
    def open_(word, rest):
        return real(np.uint32(np.uint32(np.uint32(word) << SHIFT) + np.uint32(np.int32(rest))))

    @o.jit
    def close(x, word, rest, r):
        b = bits(x)
        if np.uint32(b & MAGNITUDE) > INFINITY:
            b = QUIET_NAN
        return np.uint16(np.uint32(b + HALF) >> SHIFT), np.int16(np.uint16(b & LOW))

    return Weight(open_, close)
