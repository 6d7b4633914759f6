"""float32, stored as it is: the codec of states that are not compressed. 32 bits an element, lossless."""

from __future__ import annotations

import numpy as np

from refopt.spec import Array, Codec, Part


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """A copy of the words."""
    return {"codes": x.astype(np.float32)}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """The words back."""
    return arrays["codes"].astype(np.float32)


codec = Codec("f32", "float32", "IEEE 754 binary32", "element", (Part("codes", np.float32),), pack, unpack)
