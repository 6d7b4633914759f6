"""NF4, 4-bit NormalFloat (Dettmers et al., QLoRA, arXiv 2305.14314, section 3). 4 + 32/B bits a weight (B = 64: 4.5).

Trained weights are nearly normal. NF4's sixteen values are quantiles of a normal distribution, so that each is used
about as often as the others; one of them is an exact zero, and the ends are exactly -1 and 1::

    y = w fl32(1 / absmax)    of the block
    code                      how many midpoints of neighbouring values lie below y: ties to the lower index
    w_hat = value[code] absmax

Not symmetric: there are seven negative values and eight positive ones, and -w does not mirror w's codes. The values are
constants, published in float32; `quantiles` derives them to the last few bits. Blocks run over the flattened tensor, as
in checkpoints; two codes share a byte, the earlier in the high half. The error is at most 0.152 absmax.

>>> import numpy as np
>>> from refopt import codecs
>>> box = codecs.nf4.encode(np.float32([0.3, -1.7, 0.001, 0, 1.2, -0.0004]))
>>> print([f"{b:02x}" for b in box.codes], box.decode().round(3))
['90', '77', 'e7'] [ 0.274 -1.7    0.     0.     1.229  0.   ]
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from refopt.accelerate import count_below
from refopt.codecs import blocks
from refopt.spec import SCALES, Array, Codec, Part

f32 = np.float32
TABLE = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    f32,
)
"""Exactly representable; code 7 is the zero."""
TABLE.flags.writeable = False
ZERO = 7
MIDPOINTS = (TABLE[:-1] + TABLE[1:]) * f32(0.5)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def quantiles() -> Array:
    """Where the values come from, float64: quantiles of the normal distribution at even steps from 1/2 out to o, eight
    above zero and seven below, in parts of the last. o = 1 - (1/30 + 1/32) / 2 is the mean of the half cells that a
    grid of 15 and one of 16 leave at the end; it was published with seven digits."""
    o = round(1 - (1 / 30 + 1 / 32) / 2, 7)
    above, below = np.linspace(o, 0.5, 9)[:-1], np.linspace(o, 0.5, 8)[:-1]
    inverse = np.vectorize(NormalDist().inv_cdf)
    return np.sort(np.concatenate([inverse(above), [0.0], -inverse(below)])) / NormalDist().inv_cdf(o)


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """Count the midpoints below y = x / absmax; two codes a byte."""
    a = blocks.absmax(x, bounds, codec.nonfinite)
    y, _ = blocks.normalise(x, a, bounds)
    codes = count_below(MIDPOINTS, y).astype(np.uint8)
    return {"codes": blocks.pack_nibbles(codes, bounds, ZERO), "scales": a}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """w_hat = value[code] absmax."""
    return TABLE[blocks.unpack_nibbles(arrays["codes"], bounds)] * blocks.spread(arrays["scales"], bounds)


def settle(codec: Codec) -> Codec:
    """Blocks of a size that checkpoints have."""
    if codec.block not in BLOCKS:
        raise ValueError(f"codecs.{codec.stem}: block must be one of {', '.join(map(str, BLOCKS))}, got {codec.block}")
    return codec


codec = Codec(
    "nf4",
    "NF4, 4-bit NormalFloat",
    "Dettmers et al., arXiv 2305.14314, section 3",
    "block",
    (Part("codes", np.uint8, "nibble"), SCALES),
    pack,
    unpack,
    block=64,
    layout="flat",
    settle=settle,
)
