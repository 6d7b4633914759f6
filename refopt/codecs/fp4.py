"""FP4, a 4-bit float for weights (bitsandbytes). 4 + 32/B bits a weight (B = 64: 4.5).

Three bits of magnitude and one of sign. The code is a bit pattern, not a rank: in the order of codes 0 to 7 the
magnitudes are 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4, and code + 8 is the negative. The odd one out, 1/192, is a
subnormal. NF4 is usually better for weights that are nearly normal; checkpoints of both kinds exist::

    y = w fl32(1 / absmax)    of the block
    code                      the nearest magnitude, ties to the smaller one, plus 8 where y < 0
    w_hat = value[code] absmax

Zero is code 0, a negative that rounds to zero code 8, -0. Signs mirror. Blocks run over the flattened tensor, as in
checkpoints; two codes share a byte, the earlier in the high half. The error is at most absmax / 6.

>>> import numpy as np
>>> from refopt import codecs
>>> box = codecs.fp4.encode(np.float32([0.3, -1.7, 0.001, 0, 1.2, -0.0004]))
>>> print([f"{b:02x}" for b in box.codes], box.decode().round(3))
['6b', '00', '28'] [ 0.283 -1.7    0.     0.     1.133 -0.   ]
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from refopt.accelerate import count_below
from refopt.codecs import blocks
from refopt.spec import SCALES, Array, Codec, Part

f32 = np.float32
MAGNITUDES = [Fraction(n, 192) for n in (0, 1, 128, 192, 64, 96, 32, 48)]
"""By code."""
TABLE = np.array([float(sign * m) for sign in (1, -1) for m in MAGNITUDES]).astype(f32)
"""The sixteen values by code, each rounded to float32 once."""
TABLE[8] = -0.0
TABLE.flags.writeable = False
ORDER = np.argsort(TABLE[:8]).astype(np.uint8)
"""Codes in the order of their magnitudes."""
MIDPOINTS = (TABLE[ORDER][:-1] + TABLE[ORDER][1:]) * f32(0.5)
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """The code of the nearest magnitude, and the sign; two codes a byte."""
    a = blocks.absmax(x, bounds, codec.nonfinite)
    y, _ = blocks.normalise(x, a, bounds)
    codes = ORDER[count_below(MIDPOINTS, np.abs(y))] | (y < 0) * np.uint8(8)
    return {"codes": blocks.pack_nibbles(codes, bounds, 0), "scales": a}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """w_hat = value[code] absmax."""
    return TABLE[blocks.unpack_nibbles(arrays["codes"], bounds)] * blocks.spread(arrays["scales"], bounds)


def settle(codec: Codec) -> Codec:
    """Blocks of a size that checkpoints have."""
    if codec.block not in BLOCKS:
        raise ValueError(f"codecs.{codec.stem}: block must be one of {', '.join(map(str, BLOCKS))}, got {codec.block}")
    return codec


codec = Codec(
    "fp4",
    "FP4, a 4-bit float",
    "bitsandbytes, quantize_4bit with quant_type='fp4'",
    "block",
    (Part("codes", np.uint8, "nibble"), SCALES),
    pack,
    unpack,
    block=64,
    layout="flat",
    settle=settle,
)
