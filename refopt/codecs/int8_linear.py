"""Linear 8-bit: 255 evenly spaced levels a block. 8 + 32/B bits an element (block B = 256: 8.125).

Good for weights and momenta of even size. Never for Adam's second moment: anything below 1/254 of the block's
largest element becomes zero, m / sqrt(v) explodes, and training breaks. The codec is kept to show exactly that.

A signed state takes codes -127..127, scale absmax / 127; a non-negative one codes 0..255, scale absmax / 255.
The error is at most half a level: absmax / 254.
"""

from __future__ import annotations

import numpy as np

from refopt.codecs import blocks
from refopt.spec import CODES, SCALES, Array, Codec

f32 = np.float32


def levels(codec: Codec) -> np.float32:
    """How many levels lie above zero: 127 with a sign, 255 without."""
    return f32(127) if codec.signed else f32(255)


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """q = rint(y * levels), y = x / absmax; rint takes ties to even."""
    a = blocks.absmax(x, bounds, codec.nonfinite)
    y, _ = blocks.normalise(x, a, bounds)
    q = np.rint(y * levels(codec))
    if not codec.signed:
        q = np.maximum(q, f32(0))
    return {"codes": q.astype(np.int8 if codec.signed else np.uint8), "scales": a / levels(codec)}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """x_hat = q * scale."""
    return arrays["codes"].astype(f32) * blocks.spread(arrays["scales"], bounds)


codec = Codec(
    "int8_linear",
    "linear 8-bit, blockwise",
    "Dettmers et al., arXiv 2110.02861, section 2.1 (the linear baseline)",
    "block",
    (CODES, SCALES),
    pack,
    unpack,
    block=256,
    unsigned=True,
)
