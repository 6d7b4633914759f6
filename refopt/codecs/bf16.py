"""bfloat16, rounded to nearest even: the upper half of a float32 word. 16 bits an element.

Three significant decimal digits, float32's range. As a weight format it loses every update smaller than half a unit
in the last place (2^-9 of the weight). Rounding by chance (`bf16_sr`) or a second array that keeps what was rounded
off (`bf16_kahan`, `bf16_rem16`, `bf16_ecc`) mends this.
"""

from __future__ import annotations

import numpy as np

from refopt.spec import Array, Codec, Part


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """Round to nearest, ties to even; NaN becomes the quiet NaN of its sign."""
    bits = x.view(np.uint32)
    even = (bits >> 16) & 1
    rounded = ((bits + np.uint32(0x7FFF) + even) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) & np.uint32(0x8000) | np.uint32(0x7FC0)).astype(np.uint16)
    return {"codes": np.where(np.isnan(x), quiet, rounded)}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """Exact: the lower half of the word is zero."""
    return (arrays["codes"].astype(np.uint32) << 16).view(np.float32)


codes = Part("codes", np.uint16)
codec = Codec("bf16", "bfloat16", "IEEE 754 binary32, upper 16 bits", "element", (codes,), pack, unpack)
