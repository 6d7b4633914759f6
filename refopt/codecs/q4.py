r"""4-bit states, with a scale for each block or for each row and column (Li et al., arXiv 2309.01507, section 4).

Sixteen codes are enough for Adam if they are spent differently on its two moments: `m` needs both signs and small
values, so its levels come from the dynamic map; `v` must never become zero while `m` is not, or m / sqrt(v) explodes:
its map is linear *without a zero*. A second moment is large along whole rows or columns, so two vectors of scales can
serve it better than one a block. 4 + 32/B bits an element (B = 128: 4.25), about 4 with `scale="rank1"`::

    signed    -0.8875 .. 0.8875 in seven steps of either sign, 0 and 1 (there is no -1: a negative extreme shrinks)
    unsigned  1/16, 2/16 .. 1: a zero beside anything larger decodes to scale / 16, a bias to the safe side

    s                the block's largest magnitude; or, an element's, min over axes a of mu_a[i_a],
    mu_a[i]          the largest magnitude of slice i of axis a (SM3's cover), for tensors of two or more axes
    y = x fl32(1/s)  where s > 0; a zero block, or row, decodes to 0
    code             signed: the nearest level, ties toward zero;  unsigned: clamp(rint(16 y), 1, 16) - 1

Two codes share a byte, the earlier in the high half (`first="low"`: in the low half, as lpmm does); each block begins a
byte. A vector asked for `rank1` has block scales.

>>> import numpy as np
>>> from refopt import codecs
>>> v = np.float32([[1, 0.25, 0, 4], [4, 1, 0.5, 16]])
>>> print(codecs.q4.encode(v, signed=False).decode())
[[ 1.  1.  1.  4.]
 [ 4.  1.  1. 16.]]
>>> rank1 = codecs.q4.encode(v, signed=False, scale="rank1")
>>> print(rank1.decode(), rank1.scales)
[[ 1.       0.25     0.03125  4.     ]
 [ 4.       1.       0.5     16.     ]] [ 4.  16.   4.   1.   0.5 16. ]
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from functools import cache

import numpy as np

from refopt.accelerate import count_below
from refopt.codecs import blocks
from refopt.spec import SCALES, Array, Codec, NonFiniteError, Part

f32 = np.float32
ZERO = 7


def levels(signed: bool) -> list[Fraction]:
    """The sixteen values, exact: centres of 1, 2 and 4 equal cells of three decades, with 0 and 1; or k / 16."""
    if not signed:
        return [Fraction(k, 16) for k in range(1, 17)]
    positive = [
        Fraction(10) ** (i - 2) * (Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * j + 1, 2 * 2**i))
        for i in range(3)
        for j in range(2**i)
    ]
    return sorted([*positive, Fraction(0), Fraction(1), *(-c for c in positive)])


@cache
def table(signed: bool) -> Array:
    """The sixteen values in ascending order, each rounded to float32 once, read-only."""
    out = np.array([float(c) for c in levels(signed)]).astype(f32)
    out.flags.writeable = False
    return out


def nearest(y: Array, signed: bool) -> Array:
    """The code of each y, uint8."""
    if not signed:
        return (np.clip(np.rint(y * f32(16)), 1, 16) - 1).astype(np.uint8)
    c = table(True)[ZERO:]
    mid = (c[:-1] + c[1:]) * f32(0.5)
    steps = count_below(mid, np.abs(y))
    return np.where(y >= 0, ZERO + steps, np.maximum(ZERO - steps, 0)).astype(np.uint8)


def pack(x: Array, bounds: Array, codec: Codec, *, shape: tuple[int, ...] = ()) -> dict[str, Array]:
    """Codes of y = x / s, two a byte, and the scales."""
    if covered(codec, shape):
        scales = maxima(x, shape, codec.nonfinite)
        s = cover(scales, shape)
        live = s > 0
        y = np.where(live, x, f32(0)) * np.divide(f32(1), s, out=np.zeros_like(s), where=live)
    else:
        scales = blocks.absmax(x, bounds, codec.nonfinite)
        y, _ = blocks.normalise(x, scales, bounds)
    codes = nearest(y, codec.signed)
    zero = ZERO if codec.signed else 0
    return {"codes": blocks.pack_nibbles(codes, bounds, zero, codec.mode["first"] == "low"), "scales": scales}


def unpack(arrays: dict[str, Array], bounds: Array, codec: Codec, *, shape: tuple[int, ...] = ()) -> Array:
    """x_hat = value[code] s."""
    codes = blocks.unpack_nibbles(arrays["codes"], bounds, codec.mode["first"] == "low")
    scales = arrays["scales"]
    s = cover(scales, shape) if covered(codec, shape) else blocks.spread(scales, bounds)
    return table(codec.signed)[codes] * s


def covered(codec: Codec, shape: tuple[int, ...]) -> bool:
    """Whether a scale belongs to a slice of each axis."""
    return codec.mode["scale"] == "rank1" and len(shape) >= 2


def maxima(x: Array, shape: tuple[int, ...], nonfinite: str) -> Array:
    """The largest magnitude of each slice of each axis, axis by axis; +0 below 2^-100, NaN with NaN or Inf in it."""
    bits = (x.view(np.uint32) & np.uint32(0x7FFFFFFF)).reshape(shape)
    axes = range(len(shape))
    mu = np.concatenate([bits.max(axis=tuple(b for b in axes if b != a), initial=0) for a in axes]).view(f32)
    if nonfinite == "raise" and not np.isfinite(mu).all():
        raise NonFiniteError(f"encode: slice {int(np.argmin(np.isfinite(mu)))} of the axes holds NaN or Inf")
    mu = np.where(mu < blocks.TINY, f32(0), mu)
    return np.where(np.isfinite(mu), mu, f32(np.nan))


def cover(mu: Array, shape: tuple[int, ...]) -> Array:
    """s = min over axes a of mu_a[i_a], one an element, flat; NaN where a slice has one."""
    s = np.full(shape, np.inf, f32)
    for a, part in enumerate(np.split(mu, np.cumsum(shape)[:-1])):
        s = np.minimum(s, part.reshape([-1 if b == a else 1 for b in range(len(shape))]))
    return s.reshape(-1)


def settle(codec: Codec) -> Codec:
    """Scales of rows and columns are those of a whole tensor, whose shape they need."""
    if codec.mode["scale"] == "block":
        return replace(codec, scope="block", needs=(), parts=(CODES4, SCALES))
    return replace(codec, scope="tensor", needs=("shape",), parts=(CODES4, Part("scales", np.float32, "axis")))


CODES4 = Part("codes", np.uint8, "nibble")
codec = Codec(
    "q4",
    "4-bit states, by blocks or rank-1",
    "Li et al., arXiv 2309.01507, section 4",
    "block",
    (CODES4, SCALES),
    pack,
    unpack,
    block=128,
    unsigned=True,
    modes={"scale": ("block", "rank1"), "first": ("high", "low")},
    settle=settle,
)
