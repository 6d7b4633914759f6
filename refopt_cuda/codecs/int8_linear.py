"""Linear 8-bit codes with one scale a block: q = rint(127 y) signed, rint(255 y) unsigned, y = x / absmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Block, absmax_scale

SIGNED_DTYPE, UNSIGNED_DTYPE = np.dtype(np.int8), np.dtype(np.uint8)
MAGIC = np.float32(1.5 * 2**23)
"""Adding it rounds a float32 below 2^22 to the nearest even integer, which then stands in the low bits of the word."""
MAGIC_BITS = np.int32(0x4B400000)
ONE = np.float32(1)
ZERO = np.float32(0)


def make(o: Any, unsigned: bool = False) -> Block:
    """Codes -127..127, or 0..255 for a state that is never negative; `decode` takes them as int8 or as uint8 words."""
    mul, add, bits = o.mul, o.add, o.bits
    levels = np.float32(255 if unsigned else 127)
    code_type = np.uint8 if unsigned else np.int8

    @o.jit
    def stored(absmax):
        return absmax / levels

    @o.jit
    def encode(x, factor):
        y = mul(x, factor)
        if unsigned and y < ZERO:
            y = ZERO
        return code_type(np.int32(bits(add(mul(y, levels), MAGIC))) - MAGIC_BITS)

    @o.jit
    def decode(code, scale):
        return mul(np.float32(code_type(code)), scale)

    return Block(absmax_scale(o, stored), encode, decode, code_type(0))
