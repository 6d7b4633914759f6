"""bfloat16 weights with a running compensation (Zamirai et al., arXiv 2010.06192, Algorithm 1). 32 bits an element.

Kahan's sum carries what rounding dropped and hands it in with the next update. Small updates gather in a second
bfloat16, ``comp``, until they are worth a unit in the last place of the weight. As dear as a lossless remainder and not
exact, but every operation is one of bfloat16 alone::

    u = x - p                  the update, from the weights that the rule stepped: p, not p + c
    c = bf16(c + u)            it joins what was dropped before
    p, o = bf16(p + c), p      the new weight, and the old one
    c = bf16(c + bf16(o - p))  what the new weight did not take

Every line in float32, then rounded to bfloat16, ties to even. The rule's decay is part of u and so is compensated too,
which an implementation that shrinks p in place loses. Without an old box, encoding keeps the first rounding error:
codes = bf16(x), comp = bf16(x - codes). Decoding gives p, the weights that a model sees.
For the weights alone (`codecs={"p": "bf16_kahan"}`); the state keeps ``comp``.

>>> import numpy as np
>>> import refopt
>>> opt = refopt.Optimizer("sgd", {"p": "bf16_kahan"}, lr=1e-4)
>>> p, g = np.ones(1, np.float32), np.ones(1, np.float32)
>>> state = opt.init(p)
>>> for _ in range(1000):  # 1e-4 each: bf16 alone would stay at 1
...     p, state = opt.step(p, g, state)
>>> comp = refopt.codecs.bf16.unpack({"codes": state[0]["p"].comp}, None, None)
>>> print(p, (p + comp).round(5))
[0.90234375] [0.90056]
"""

from __future__ import annotations

import numpy as np

from refopt.spec import Array, Codec, Part


def word(x: Array) -> Array:
    """bfloat16 words: nearest, ties to even; NaN becomes the quiet NaN of its sign."""
    bits = x.view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    quiet = bits & np.uint32(0x80000000) | np.uint32(0x7FC00000)
    return (np.where(np.isnan(x), quiet, rounded) >> 16).astype(np.uint16)


def value(words: Array) -> Array:
    """The float32 number of a bfloat16 word."""
    return (words.astype(np.uint32) << 16).view(np.float32)


def bf16(x: Array) -> Array:
    """Rounded to bfloat16, as float32."""
    return value(word(x))


def pack(x: Array, bounds: Array, codec: Codec, *, old: dict[str, Array] | None = None) -> dict[str, Array]:
    """One compensated addition to the old weights; without old weights, x and its rounding error."""
    with np.errstate(invalid="ignore", over="ignore"):
        if old is None:
            return {"codes": word(x), "comp": word(x - bf16(x))}
        o, c = value(old["codes"]), value(old["comp"])
        u = x - o
        c = bf16(c + u)
        p = bf16(o + c)
        c = bf16(c + bf16(o - p))
    return {"codes": word(p), "comp": word(c)}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """The weights that are seen; the compensation waits for the next update."""
    return value(arrays["codes"])


codec = Codec(
    "bf16_kahan",
    "bfloat16 weights with a running compensation",
    "Zamirai et al., arXiv 2010.06192, Algorithm 1",
    "element",
    (Part("codes", np.uint16), Part("comp", np.uint16)),
    pack,
    unpack,
    needs=("old",),
    weights=True,
)
