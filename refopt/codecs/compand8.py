"""Companded 8-bit (FlashOptim, arXiv 2602.23349): bend the scale, then step evenly. 8 + 16/B bits (B = 32: 8.5).

Even steps waste themselves on the rare large elements of a block. A curve before the steps, and its inverse after,
makes small values finer without a table search: softsign for a state of either sign, the square root for a second
moment. Blocks are short, so their scales are kept in 16 bits::

    signed     a = max |x|           unsigned   a = max sqrt(v)
    s          a in float16, at most 65504 (`scale="bf16"`: in bfloat16, which neither overflows nor underflows)
    y          x fl32(1/s), clamped to [-1, 1]; or sqrt(v) fl32(1/s)
    q          rint(z 127), z = (2 y) fl32(1 / (1 + |y|)); or rint(y 255)
    decoded    table[q] s, table[q] = q / (254 - |q|); or w w, w = (q / 255) s

Each table entry is rounded once. A step of the softsign is 1/254 of the extreme at zero, 1/64 at the extreme. A v below
(1/510)^2 of the largest becomes zero, so the square root holds Adam's second moment for two decades, not for four.

Beware of float16: a block whose a is below 2^-25 (3e-8, ordinary for momenta of large models) has scale 0 and is lost.
`compat="flashoptim"` computes what that library does: y divided by the unrounded a (at least 1e-12) though decoded with
the rounded one, halves rounded up, and a beyond 65504 becomes infinite.

>>> import numpy as np
>>> from refopt import codecs
>>> x = np.float32([1, -0.5, 0.01, 0.001])
>>> print(codecs.compand8.encode(x).codes, codecs.compand8.encode(x).decode().round(5))
[127 -85   3   0] [ 1.      -0.50296  0.01195  0.     ]
>>> print(codecs.compand8.encode(x * x, signed=False).codes)
[255 128   3   0]
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np

from refopt.codecs import blocks
from refopt.spec import CODES, Array, Codec, Part

f32 = np.float32
LARGEST = {"f16": 0x7BFF, "bf16": 0x7F7F}
"""The words of the largest finite scales."""


@cache
def table(signed: bool) -> Array:
    """What each byte decodes to beside scale 1 (of v: its root), fractions rounded once; -128 is never written."""
    codes = [q - 256 if signed and q > 127 else q for q in range(256)]
    values = [Fraction(q, 254 - abs(q)) if signed else Fraction(q, 255) for q in codes]
    out = np.array([float(v) for v in values]).astype(f32)
    out.flags.writeable = False
    return out


def words(a: Array, form: str) -> Array:
    """Scales in 16 bits, nearest, ties to even, at most the largest number; a NaN stays the quiet one."""
    bits = a.view(np.uint32)
    with np.errstate(over="ignore"):
        near = (
            a.astype(np.float16).view(np.uint16) if form == "f16" else bits + np.uint32(0x7FFF) + (bits >> 16 & 1) >> 16
        )
    return np.where(np.isnan(a), 0x7E00 if form == "f16" else 0x7FC0, np.minimum(near, LARGEST[form])).astype(np.uint16)


def value(scales: Array) -> Array:
    """The float32 number of a 16-bit scale."""
    return scales.astype(f32) if scales.dtype == np.float16 else (scales.astype(np.uint32) << 16).view(f32)


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """q = rint(z 127) or rint(y 255), y in parts of the rounded scale."""
    a = blocks.absmax(x, bounds, codec.nonfinite)
    if not codec.signed:
        x, a = np.sqrt(np.maximum(x, f32(0))), np.sqrt(a)
    if codec.mode["compat"] == "flashoptim":
        return {"codes": flash(x, a, bounds, codec.signed), "scales": half(a)}
    word = words(a, codec.mode["scale"])
    scales = word.view(np.float16) if codec.mode["scale"] == "f16" else word
    y, _ = blocks.normalise(x, value(scales), bounds)
    y = np.clip(y, f32(-1), f32(1))
    if codec.signed:
        z = (f32(2) * y) * (f32(1) / (f32(1) + np.abs(y)))
        return {"codes": np.rint(z * f32(127)).astype(np.int8), "scales": scales}
    return {"codes": np.rint(y * f32(255)).astype(np.uint8), "scales": scales}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """table[q] s; a second moment is its square."""
    codes, s = arrays["codes"], blocks.spread(value(arrays["scales"]), bounds)
    if codec.mode["compat"] == "flashoptim" and codec.signed:
        t = codes.astype(f32) / f32(127)
        with np.errstate(invalid="ignore"):
            return t / (f32(2) - np.abs(t)) * s
    w = table(codec.signed)[codes] * s
    return w if codec.signed else w * w


def flash(x: Array, a: Array, bounds: Array, signed: bool) -> Array:
    """Codes as FlashOptim computes them; those of a block that is not finite are 0."""
    a = blocks.spread(np.maximum(a, f32(1e-12)), bounds)
    y = np.where(np.isnan(a), f32(0), x) / np.where(np.isnan(a), f32(1), a)
    z = (f32(2) * y) / (f32(1) + np.abs(y)) if signed else y
    q = np.floor(z * f32(127 if signed else 255) + f32(0.5))
    return q.astype(np.int8 if signed else np.uint8)


def half(a: Array) -> Array:
    """max(a, 1e-12) in float16, where it may be 0 or infinite."""
    with np.errstate(over="ignore"):
        return np.maximum(a, f32(1e-12)).astype(np.float16)


def settle(codec: Codec) -> Codec:
    """Scales in the 16 bits that were asked for; FlashOptim's are float16."""
    if codec.mode["compat"] == "flashoptim" and codec.mode["scale"] != "f16":
        raise ValueError(f"codecs.compand8: compat='flashoptim' has scale='f16', got {codec.mode['scale']!r}")
    dtype: Any = np.float16 if codec.mode["scale"] == "f16" else np.uint16
    return replace(codec, parts=(CODES, Part("scales", dtype, "block")))


codec = Codec(
    "compand8",
    "companded 8-bit, blockwise",
    "FlashOptim, arXiv 2602.23349",
    "block",
    (CODES, Part("scales", np.float16, "block")),
    pack,
    unpack,
    block=32,
    unsigned=True,
    modes={"scale": ("f16", "bf16"), "compat": (None, "flashoptim")},
    settle=settle,
)
