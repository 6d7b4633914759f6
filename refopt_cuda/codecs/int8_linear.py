"""Linear 8-bit codes with one scale a block: q = rint(127 y) signed, rint(255 y) unsigned, y = x / absmax."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Block, absmax_scale

OPTIONS = {"signed": (True, False)}
BITS = 8
MAGIC = np.float32(1.5 * 2**23)
"""Adding it rounds a float32 below 2^22 to the nearest even integer, which then stands in the low bits of the word."""
MAGIC_BITS = np.int32(0x4B400000)
ONE = np.float32(1)
ZERO = np.float32(0)


def dtype(signed: bool = True) -> np.dtype:
    """Of the codes."""
    return np.dtype(np.int8 if signed else np.uint8)


def scale_dtype(signed: bool = True) -> np.dtype:
    """Of the scales."""
    return np.dtype(np.float32)


def tables(signed: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Nothing to look up."""
    return np.zeros(0, np.float32), np.zeros(0, np.uint32)


def make(o: Any, signed: bool = True) -> Block:
    """Codes -127..127, or 0..255 for a state that is never negative; `decode` takes them as int8 or as uint8 words."""
    mul, add, bits = o.mul, o.add, o.bits
    levels = np.float32(127 if signed else 255)
    code_type = np.int8 if signed else np.uint8
    unsigned = not signed

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
