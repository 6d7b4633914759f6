"""8-bit floats with a scale for each block (Micikevicius et al., arXiv 2209.05433, Table 1). 8 + 32/B bits an element.

A word of sign, exponent and a few bits of mantissa has the same relative error over many decades and needs no table;
GPUs convert it in hardware. What it lacks in range, the scale of a block gives: the largest element takes the largest
number.

========  ====  ========  =======  ==========  =============  ==================
`format`  bias  mantissa  largest  min normal  min subnormal  not finite
========  ====  ========  =======  ==========  =============  ==================
``e4m3``  7     3 bits    448      2^-6        2^-9           NaN 7F FF, no Inf
``e5m2``  15    2 bits    57344    2^-14       2^-16          Inf 7C FC, NaN 7D+
========  ====  ========  =======  ==========  =============  ==================

::

    s = absmax / largest         one a block, or one a tensor with `scale="tensor"` (Transformer Engine's FusedAdam)
    code = fp8(y largest)        y = x / absmax; nearest, ties to even, beyond the largest the largest
    x_hat = value[code] s

The relative error is at most 2^-4 (e4m3) or 2^-3 (e5m2) in the normal range; in e4m3 what is below absmax / 458752
(2.2e-6) becomes zero, in e5m2 below absmax / 7.5e9. A scale for a whole tensor loses a second moment that way. Signs
are stored, so a state that is never negative leaves half of the words unused.

>>> import numpy as np
>>> from refopt import codecs
>>> for form in ("e4m3", "e5m2"):
...     box = codecs.fp8.encode(np.float32([448, -17, 0.3, 9e-4]), format=form)
...     print([f"{c:02x}" for c in box.codes], box.decode())
['7e', 'd8', '2a', '00'] [ 4.480e+02 -1.600e+01  3.125e-01  0.000e+00]
['7b', 'e8', '51', '2f'] [ 4.480000e+02 -1.600000e+01  3.125000e-01  8.544922e-04]
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from refopt.codecs import blocks
from refopt.spec import CODES, SCALES, Array, Codec, Part

f32 = np.float32
FORMATS = {"e4m3": (3, -6, 448.0, 0x7E), "e5m2": (2, -14, 57344.0, 0x7B)}
"""(bits of mantissa, least exponent, largest number, its word)."""


def word(x: Array, form: str) -> Array:
    """The nearest word to each float32 number, ties to even, beyond the largest the largest; NaN is 7F.

    k counts the steps of 2^(e - mantissa) in |x|; a count that reaches the next binade is that binade's first word.
    """
    mantissa, least, largest, last = FORMATS[form]
    a = np.minimum(np.abs(np.where(np.isnan(x), f32(0), x)), f32(largest))
    e = np.where(a < f32(2.0**least), least, np.frexp(a)[1] - 1)
    k = np.rint(np.ldexp(a, mantissa - e)).astype(np.int64)
    code = np.minimum((e - least) * 2**mantissa + k, last)
    return np.where(np.isnan(x), 0x7F, code | np.signbit(x) * 0x80).astype(np.uint8)


@cache
def table(form: str) -> Array:
    """The number of each word, read off its fields; float32, read-only."""
    mantissa, least, _, last = FORMATS[form]
    w = np.arange(128)
    field, fraction = w >> mantissa, w & (2**mantissa - 1)
    steps = np.where(field > 0, fraction + 2**mantissa, fraction)
    half = np.ldexp(steps.astype(f32), np.maximum(field - 1, 0) + least - mantissa)
    half[last + 1 :] = np.nan
    if form == "e5m2":
        half[last + 1] = np.inf
    out = np.concatenate([half, -half])
    out.flags.writeable = False
    return out


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """code = fp8(y largest), y = x / absmax; s = absmax / largest."""
    largest = f32(FORMATS[codec.mode["format"]][2])
    shared = sharing(x.size, bounds, codec)
    a = blocks.absmax(x, shared, codec.nonfinite)
    y, _ = blocks.normalise(x, a, shared)
    scales = a / largest if a.size or codec.scope == "block" else np.zeros(1, f32)
    return {"codes": word(y * largest, codec.mode["format"]), "scales": scales}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """x_hat = value[code] s."""
    codes, scales = arrays["codes"], arrays["scales"]
    shared = sharing(codes.size, bounds, codec)
    return table(codec.mode["format"])[codes] * blocks.spread(scales[: len(shared) - 1], shared)


def sharing(size: int, bounds: Array, codec: Codec) -> Array:
    """Which elements share a scale: the block list, or all of them."""
    return bounds if codec.scope == "block" or not size else np.array([0, size])


def settle(codec: Codec) -> Codec:
    """One scale for all is one that needs all at once."""
    per = codec.mode["scale"]
    return replace(codec, scope=per, parts=(CODES, Part("scales", np.float32, per)))


codec = Codec(
    "fp8",
    "8-bit floats, blockwise",
    "Micikevicius et al., arXiv 2209.05433, Table 1; block scales as in torchao",
    "block",
    (CODES, SCALES),
    pack,
    unpack,
    block=256,
    modes={"format": ("e4m3", "e5m2"), "scale": ("block", "tensor")},
    settle=settle,
)
