"""bfloat16 weights and the 16 bits that they lack (Transformer Engine's "parameter remainders"). 32 bits, lossless.

Mixed precision keeps a float32 master copy beside the bfloat16 weights: six bytes, though the upper half of the one
is nearly the other. Here the master word is cut in two, and the visible half is rounded: four bytes, and the float32
trajectory bit for bit::

    p = (x + 0x8000) >> 16    the visible half, on words: rounded to nearest, ties away from zero
    rem = x - (p << 16)       the lower half as a signed number, -32768 .. 32767
    x = (p << 16) + rem       exactly, for every word that is no NaN

Ties differ from bfloat16's rounding to even: the remainder must say by itself whether p was rounded up. A word near the
largest float shows as infinity and is still exact. NaN is stored as 0x7FC00000: 0x7FFF8000 and above would show as -0.
For the weights alone (`codecs={"p": "bf16_rem16"}`); the state keeps ``rem``.

>>> import numpy as np
>>> from refopt import codecs
>>> box = codecs.bf16_rem16.encode(np.float32([3.14159274, 1.00390625]))
>>> print([f"{c:04x}" for c in box.codes], box.rem, box.decode())
['4049', '3f81'] [  4059 -32768] [3.1415927 1.0039062]
"""

from __future__ import annotations

import numpy as np

from refopt.spec import Array, Codec, Part


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """Two halves of the word; the upper one is rounded up where the lower one is negative."""
    word = np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))
    p = (word + np.uint32(0x8000)) >> 16
    rem = (word & np.uint32(0xFFFF)).astype(np.uint16).view(np.int16)
    return {"codes": p.astype(np.uint16), "rem": rem}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """The word whose halves they are."""
    upper = arrays["codes"].astype(np.uint32) - (arrays["rem"] < 0)
    return (upper << 16 | arrays["rem"].view(np.uint16)).view(np.float32)


codec = Codec(
    "bf16_rem16",
    "bfloat16 weights and their remainders, lossless",
    "NVIDIA Transformer Engine, FusedAdam, store_param_remainders",
    "element",
    (Part("codes", np.uint16), Part("rem", np.int16)),
    pack,
    unpack,
    weights=True,
)
