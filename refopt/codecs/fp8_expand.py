"""8-bit floats after dynamic range expansion (COAT, arXiv 2410.19313, section 4). 8 + 96/B bits (B = 128: 8.75).

The magnitudes of a block rarely span what e4m3 can: exponents lie idle while three bits of mantissa err by 6 %. A power
stretches the block over all of the format's range, and its inverse divides the error by the exponent. Where a block
spans more than the format, the same power, below 1, squeezes it in, so that nothing but zero becomes zero::

    c       centre   sqrt(max |x|) sqrt(min |x|), the least of those that are not zero
    k       power    floor(16 log2(448^2 / 2) / log2(max / min)) / 16, in [1/16, 16]; 1 where max / min <= 2^(1/16)
    s       scales   (max / c)^k / 448
    code    e4m3 of sgn(x) (|x| / c)^k / s
    x_hat   sgn (|value[code]| s)^(1/k) c; code 0 is 0

One tiny element squeezes its whole block: k is then small, and the others err by more than in fp8 itself.

Powers and quotients are float64, c, k and s are rounded to float32 once: a machine with another `pow` may differ in a
last place. Without the bound on k a block of equal magnitudes would have an infinite one and decode to NaN, and a zero
code, raised to 1/k, to c. Made of `fp8`.

>>> import numpy as np
>>> from refopt import codecs
>>> x = np.float32([3, -2, 0, 1.1])
>>> box = codecs.fp8_expand.encode(x)
>>> print(box.power, box.decode().round(3), codecs.fp8.encode(x).decode().round(3))
[11.4375] [ 3.    -2.006  0.     1.083] [ 3.    -1.929  0.     1.071]
"""

from __future__ import annotations

import numpy as np

from refopt.codecs import blocks
from refopt.codecs.fp8 import table, word
from refopt.spec import CODES, SCALES, Array, Codec, Part

f32, f64 = np.float32, np.float64
LARGEST = 448.0
SPAN = np.log2(LARGEST**2 / 2)
"""Binades that a stretched block spans."""


def least(x: Array, bounds: Array) -> Array:
    """The smallest magnitude of each block that is not zero, infinite where there is none, float64."""
    if len(bounds) == 1:
        return np.zeros(0)
    a = np.abs(x).astype(f64)
    return np.minimum.reduceat(np.where(a > 0, a, np.inf), bounds[:-1])


def exponent(ratio: Array) -> Array:
    """k, in sixteenths: what stretches `ratio` over the span."""
    k = np.floor(16 * SPAN / np.maximum(np.log2(ratio), 1 / 16)) / 16
    return np.where(ratio <= 2 ** (1 / 16), 1.0, np.clip(k, 1 / 16, 16))


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """Centre, power and scale of each block, and the words of what they make of its elements."""
    a = blocks.absmax(x, bounds, codec.nonfinite)
    live = a > 0
    top = np.where(live, a, f32(1)).astype(f64)
    low = np.where(live, least(x, bounds), 1.0)
    k, c = exponent(top / low), (np.sqrt(top) * np.sqrt(low)).astype(f32)
    s = ((top / c) ** k / LARGEST).astype(f32)
    ones = [blocks.spread(v, bounds).astype(f64) for v in (c, k, s)]
    size = np.where(blocks.spread(live, bounds), np.abs(x), f32(0)) / ones[0]
    z = np.copysign(size ** ones[1] / ones[2], np.where(size > 0, x, f32(0)))
    centre = np.where(live, c, f32(0))
    return {
        "codes": word(z.astype(f32), "e4m3"),
        "scales": np.where(live, s, a),
        "power": k.astype(f32),
        "centre": centre,
    }


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """x_hat = sgn (|value| s)^(1/k) c; a zero is 0, or NaN beside a scale of NaN."""
    v = table("e4m3")[arrays["codes"]].astype(f64)
    s, k, c = (blocks.spread(arrays[name], bounds).astype(f64) for name in ("scales", "power", "centre"))
    size = np.where(v == 0, 0 * s, (np.abs(v) * s) ** (1 / k) * c)
    with np.errstate(under="ignore", over="ignore"):
        return np.copysign(size, v).astype(f32)


codec = Codec(
    "fp8_expand",
    "8-bit floats after dynamic range expansion",
    "COAT, arXiv 2410.19313, section 4",
    "block",
    (CODES, SCALES, Part("power", np.float32, "block"), Part("centre", np.float32, "block")),
    pack,
    unpack,
    block=128,
)
