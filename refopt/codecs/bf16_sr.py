"""bfloat16 weights, rounded by chance (Gupta et al., arXiv 1502.02551, section 3). 16 bits an element.

Rounded to nearest, a weight in bfloat16 never feels an update below 2^-9 of itself: thousands of them leave it where it
was. Rounded by chance it moves by a whole unit in the last place, as often as the update is a part of one: the mean
over the random bits is the exact weight, at the price of noise::

    x = p + update        what the rule wants to store, float32
    r                     16 random bits of this element, step and tensor (`refopt.rng`): uniform on 0 .. 65535
    p = (x + r) >> 16     on the word: the lower half of x is the chance, out of 65536, of a carry into the upper half

Sign and magnitude are separate bits of a word, so both signs round alike. What bfloat16 holds exactly never moves;
infinity stays, NaN becomes the quiet NaN of its sign, and a number beyond bfloat16's largest may become infinite.
For the weights alone (`codecs={"p": "bf16_sr"}`); nothing is kept beside them.

>>> import numpy as np
>>> from refopt import codecs, rng
>>> x = np.full(65536, 1 + 2**-9, np.float32)  # a quarter of the way from 1 to the next bfloat16
>>> random = rng.r16(rng.key(seed=0, step=1, tensor=0), 0, x.size)
>>> up = codecs.bf16_sr.encode(x, random=random).decode() > 1
>>> print(codecs.bf16.encode(x).decode().max(), up.mean().round(3))
1.0 0.247
"""

from __future__ import annotations

import numpy as np

from refopt.spec import Array, Codec, Part


def pack(x: Array, bounds: Array, codec: Codec, *, random: Array) -> dict[str, Array]:
    """Add the random bits below the words that are kept, and cut; NaN becomes the quiet NaN of its sign."""
    bits = x.view(np.uint32)
    quiet = bits & np.uint32(0x80000000) | np.uint32(0x7FC00000)
    word = np.where(np.isnan(x), quiet, bits + random)
    return {"codes": (word >> 16).astype(np.uint16)}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """Exact: the lower half of the word is zero."""
    return (arrays["codes"].astype(np.uint32) << 16).view(np.float32)


codec = Codec(
    "bf16_sr",
    "bfloat16 weights, rounded by chance",
    "Gupta et al., arXiv 1502.02551, section 3",
    "element",
    (Part("codes", np.uint16),),
    pack,
    unpack,
    needs=("random",),
    weights=True,
)
