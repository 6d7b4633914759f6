"""bfloat16 weights and a coarse error (FlashOptim, arXiv 2602.23349, weight splitting). 24 or 32 bits an element.

A rounded weight misses the exact one by at most half a unit in its last place. That error, as a fraction of the half
unit, needs no exponent of its own: eight bits of it make bfloat16 weights about as good as float32 with 16 bits of
mantissa, at three bytes instead of six::

    p = bf16(x)                  nearest, ties to even
    h = 2^(max(E, -126) - 8)     half a unit in the last place of p, E its exponent
    q = rint((x - p) / h N)      N = 127 for `bits=8`, 32767 for `bits=16`; 0 where p is infinite or NaN
    x_hat = p + (q fl32(1/N)) h

The difference and its quotient by h are exact; the error of x_hat is at most half a step, h / 254 for 8 bits, and the
rounding of the last sum. With 16 bits all but some float32 words come back, the others one unit off: not lossless, at
the bytes of `bf16_rem16`, which is. For the weights alone (`codecs={"p": "bf16_ecc"}`); the state keeps ``error``.

>>> import numpy as np
>>> from refopt import codecs
>>> x = np.float32([3.14159274, 1.00390625])
>>> box = codecs.bf16_ecc.encode(x)
>>> print([f"{c:04x}" for c in box.codes], box.error, box.decode())
['4049', '3f80'] [ 16 127] [3.1416092 1.0039062]
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refopt.spec import Array, Codec, Part

f32 = np.float32
LEVELS = {8: 127, 16: 32767}


def half_unit(words: Array) -> Array:
    """2^(max(E, -126) - 8) for bfloat16 words of exponent E: at least 2^-134, a power of two, subnormal or not."""
    exponent = np.maximum((words >> 7 & 0xFF).astype(np.int32), 1) - 127
    return np.ldexp(f32(1), exponent - 8)


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """The nearest bfloat16, and what it misses in parts of half a unit in its last place."""
    bits = x.view(np.uint32)
    quiet = bits & np.uint32(0x80000000) | np.uint32(0x7FC00000)
    p = (np.where(np.isnan(x), quiet, bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    finite = (p & 0x7F80) != 0x7F80
    e = np.where(finite, x, f32(0)) - np.where(finite, _value(p), f32(0))
    q = np.rint(e / half_unit(p) * f32(LEVELS[codec.mode["bits"]]))
    return {"codes": p, "error": q.astype(f"i{codec.mode['bits'] // 8}")}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """p + (q fl32(1/N)) h."""
    part = arrays["error"].astype(f32) * (f32(1) / f32(LEVELS[codec.mode["bits"]]))
    return _value(arrays["codes"]) + part * half_unit(arrays["codes"])


def _value(words: Array) -> Array:
    return (words.astype(np.uint32) << 16).view(f32)


def settle(codec: Codec) -> Codec:
    """The error's array has the bits that were asked for."""
    return replace(codec, parts=(codec.parts[0], Part("error", np.dtype(f"i{codec.mode['bits'] // 8}"))))


codec = Codec(
    "bf16_ecc",
    "bfloat16 weights and their error in 8 or 16 bits",
    "FlashOptim, arXiv 2602.23349",
    "element",
    (Part("codes", np.uint16), Part("error", np.int8)),
    pack,
    unpack,
    weights=True,
    modes={"bits": (8, 16)},
    settle=settle,
)
