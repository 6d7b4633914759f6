"""Double quantization: 4-bit weights whose scales are coded too (Dettmers et al., QLoRA, arXiv 2305.14314, section 3).

A float32 scale for each 64 weights costs half a bit a weight. The scales of one tensor are alike, so their mean is
taken off and the rest stored in eight bits, 256 scales to a block: 4.127 bits a weight instead of 4.5::

    a                 absmax of each block of B weights (`nf4`, or `fp4` with `base="fp4"`); the codes are theirs
    offset            mean of all a: summed in float64 in the canonical order (`refopt.reduce`), rounded once
    scales, scales2   dynamic8, signed, of a - offset, in blocks of 256
    a_hat             decoded scales + offset
    w_hat             value[code] a_hat

The paper's text says an 8-bit float for the second level; its code, and this file, take the dynamic map. Weights are
divided by their true a and multiplied by a_hat. A zero stays zero; a block of zeros too, though its a_hat is not 0.
Where a is below 1 % of the largest scales, a_hat may be far off, or negative, and turn the block's signs. One NaN is
in the mean of all: ask for `nonfinite="raise"` where weights may hold one. Made of `nf4`, `fp4` and `dynamic8`.

>>> import numpy as np
>>> from refopt import codecs
>>> w = np.float32([[1, -0.5] * 32, [0.25, 0.125] * 32, [0.5, -0.25] * 32])
>>> box = codecs.double.encode(w)
>>> print(box.offset, box.scales, box.scales2, box.decode()[:, 0].round(3))
0.5833333 [255  14  56] [0.4166667] [1.    0.252 0.498]
>>> codecs.double.nbytes((4096, 4096)) * 8 / 4096**2
4.126955032348633
"""

from __future__ import annotations

import numpy as np

from refopt import reduce
from refopt.codecs import blocks
from refopt.codecs.dynamic8 import codec as dynamic8
from refopt.codecs.fp4 import codec as fp4
from refopt.codecs.nf4 import codec as nf4
from refopt.spec import Array, Codec, Part

f32 = np.float32
BASES = {"nf4": nf4, "fp4": fp4}
GROUP = 256


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """The base's codes; its scales less their mean, by dynamic8."""
    first = BASES[codec.mode["base"]].pack(x, bounds, codec)
    a = first["scales"]
    offset = reduce.mean(a) if a.size else f32(0)
    second = dynamic8.pack(a - offset, groups(a.size), dynamic8)
    named = {"scales": second["codes"], "scales2": second["scales"], "offset": np.array([offset], f32)}
    return {"codes": first["codes"]} | named


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """w_hat = value[code] a_hat, a_hat = decoded scales + offset."""
    second = {"codes": arrays["scales"], "scales": arrays["scales2"]}
    a = dynamic8.unpack(second, groups(len(bounds) - 1), dynamic8) + arrays["offset"][0]
    return BASES[codec.mode["base"]].unpack({"codes": arrays["codes"], "scales": a}, bounds, codec)


def groups(count: int) -> Array:
    """The second level's block list: the scales of a tensor, flat."""
    return blocks.bounds((count,), GROUP, "flat")


def settle(codec: Codec) -> Codec:
    """Blocks of a size that the base has."""
    check = BASES[codec.mode["base"]].settle
    return codec if check is None else check(codec)


codec = Codec(
    "double",
    "double quantization of 4-bit weights",
    "Dettmers et al., arXiv 2305.14314, section 3",
    "tensor",
    (
        Part("codes", np.uint8, "nibble"),
        Part("scales", np.uint8, "block"),
        Part("scales2", np.float32, "group"),
        Part("offset", np.float32, "tensor"),
    ),
    pack,
    unpack,
    block=64,
    layout="flat",
    modes={"base": ("nf4", "fp4")},
    settle=settle,
)
