r"""Dynamic 8-bit, blockwise (Dettmers, arXiv 1511.04561; Dettmers et al., arXiv 2110.02861, section 2). 8 + 32/B bits.

A state spans seven decades inside one block; evenly spaced levels waste themselves on the largest. The dynamic map
spends them by decade: in decade i (10^(i-7) to 10^(i-6), i = 0..6) it has 2^i cell centres (twice as many for a state
without a sign), so large values get a relative error of a few per cent and small ones still keep their size.

Signed: 256 values, zero at 127, from -0.99296875 to 1.0 (there is no -1.0: an extreme that is negative shrinks).
Unsigned: zero at 0, up to 1.0. The values are exact fractions, rounded to float32 once. Ties between two codes go
to the smaller magnitude.

Libraries differ in the last bits. `ties`: "zero" is ours, "lower" that of bitsandbytes' portable code and of lpmm,
"even" (the even code) that of bitsandbytes on CUDA, "upper" torchao's. `compat="bitsandbytes"` takes that library's
table, a third of whose values are one or two units off, and its optimizers' rule that a code has the sign bit of its
element: a small negative number, even -0, becomes -5.5e-7 absmax, where a small positive one becomes 0.

>>> from refopt.codecs import dynamic8
>>> from refopt.codecs.dynamic8 import table
>>> print(table(True)[127:130], table(True)[0])
[0.00e+00 5.50e-07 3.25e-06] -0.99296874
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np

from refopt.accelerate import count_below
from refopt.codecs import blocks
from refopt.spec import CODES, SCALES, Array, Codec

f32 = np.float32


def cells(signed: bool) -> list[Fraction]:
    """The positive cell centres: decade i has K_i equal cells of [0.1, 1], scaled by 10^(i-6)."""
    out = []
    for i in range(7):
        k = 2**i if signed else 2 ** (i + 1)
        for j in range(k):
            out.append(Fraction(10) ** (i - 6) * (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 * k)))
    return out


@cache
def table(signed: bool) -> Array:
    """The 256 values in ascending order, float32, read-only."""
    positive = cells(signed)
    values = sorted([*positive, Fraction(0), Fraction(1), *(-c for c in positive if signed)])
    out = np.array([f32(float(v)) for v in values], f32)
    out.flags.writeable = False
    return out


@cache
def bitsandbytes_table(signed: bool) -> Array:
    """The same cells as bitsandbytes computes them, read-only: edges by torch.linspace in float32 (from both ends to
    the middle, product and sum rounded together), their means and the decade's factor in float32 too."""
    positive = []
    for i in range(7):
        k = 2**i if signed else 2 ** (i + 1)
        j, step = np.arange(k + 1), float((f32(1) - f32(0.1)) / f32(k))
        edges = np.where(j < (k + 1) // 2, float(f32(0.1)) + step * j, 1.0 - step * (k - j)).astype(f32)
        positive += ((edges[:-1] + edges[1:]) / f32(2) * f32(10.0 ** (i - 6))).tolist()
    out = np.array(sorted(positive + [0.0, 1.0] + [-c for c in positive if signed]), f32)
    out.flags.writeable = False
    return out


@cache
def midpoints(signed: bool) -> Array:
    """Where one code ends and the next begins, on the non-negative half of the table."""
    c = table(signed)[127:] if signed else table(signed)
    return (c[:-1] + c[1:]) * f32(0.5)


def levels(codec: Codec) -> Array:
    """The table that a record reads and writes by."""
    return (bitsandbytes_table if codec.mode["compat"] else table)(codec.signed)


def nearest(y: Array, c: Array, ties: str) -> Array:
    """The index of the value of c that is nearest to each y: one more than the midpoints below it; `ties` decides what
    a midpoint itself takes."""
    mid = (c[:-1] + c[1:]) * f32(0.5)
    if ties == "upper":
        return np.searchsorted(mid, y, side="right")
    low = np.searchsorted(mid, y, side="left")
    if ties == "lower":
        return low
    high = np.where(y == mid[np.minimum(low, len(mid) - 1)], low + 1, low)
    return np.where(low % 2 == 0, low, high) if ties == "even" else np.where(y < 0, high, low)


def same_sign(codes: Array, y: Array, c: Array) -> Array:
    """As bitsandbytes' optimizers do: a code whose value has another sign bit than y moves one step over zero."""
    wrong = np.signbit(c[codes]) != np.signbit(y)
    return np.where(wrong, np.where(y > 0, codes + 1, codes - 1), codes)


def theirs(y: Array, codec: Codec) -> Array:
    """Codes by another rule for ties, or by another table."""
    c = levels(codec)
    codes = nearest(y, c, codec.mode["ties"])
    return same_sign(codes, y, c) if codec.mode["compat"] and codec.signed else codes


def pack(x: Array, bounds: Array, codec: Codec) -> dict[str, Array]:
    """Nearest value of the table to y = x / absmax: count the midpoints below |y|."""
    a = blocks.absmax(x, bounds, codec.nonfinite)
    y, _ = blocks.normalise(x, a, bounds)
    if codec.mode["ties"] != "zero" or codec.mode["compat"]:
        codes = theirs(y, codec)
    elif codec.signed:
        c = count_below(midpoints(True), np.abs(y))
        codes = np.where(y >= 0, 127 + c, np.maximum(127 - c, 0))
    else:
        codes = count_below(midpoints(False), y)
    return {"codes": codes.astype(np.uint8), "scales": a}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec) -> Array:
    """x_hat = table[code] * absmax."""
    return levels(codec)[arrays["codes"]] * blocks.spread(arrays["scales"], bounds)


codec = Codec(
    "dynamic8",
    "dynamic 8-bit, blockwise",
    "Dettmers et al., arXiv 2110.02861, section 2",
    "block",
    (CODES, SCALES),
    pack,
    unpack,
    block=256,
    unsigned=True,
    modes={"ties": ("zero", "lower", "even", "upper"), "compat": (None, "bitsandbytes")},
)
