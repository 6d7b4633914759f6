"""How far two results are apart, in units of the last place of what went into them; and what rounding alone decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from refopt.spec import Array

f32 = np.float32
States = Mapping[str, Array]
Step = Callable[[Array, Array, dict[str, Array], int], tuple[Array, dict[str, Array]]]
"""One step of one tensor: (p, g, state, t) -> (p, state)."""

NUDGE = 2.0**-22
"""Two units of the last place: how much inputs are moved to see what rounding does."""
BACKWARD = 4.0
"""How many such nudges of its inputs a result may be off by: an error of eight units in what went in."""
DECIDED = 2.0**12
"""Ulps beyond which an element that a nudge moves so far is called undecided: it jumps, it does not shift."""


def unit(*xs: Array) -> Array:
    """A float32 unit of the last place of the largest of each element, as float64; never below the least normal's."""
    size = np.abs(xs[0])
    for x in xs[1:]:
        size = np.fmax(size, np.abs(x))
    return np.spacing(np.fmax(np.minimum(size, f32(3e38)), f32(2.0**-126)).astype(f32)).astype(np.float64)


def ulps(got: Array, want: Array, *others: Array) -> Array:
    """|got - want| in float32 units of the last place of the largest of `want` and `others`.

    The operands set the unit: what is left when they cancel carries their rounding. NaN beside NaN, and equal
    infinities, are 0 apart; NaN or Inf beside anything else is infinitely far.
    """
    with np.errstate(all="ignore"):
        far = np.abs(got.astype(np.float64) - want.astype(np.float64)) / unit(want, *others)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    return np.where(same, 0.0, np.where(np.isfinite(far), far, np.inf))


def bf16(x: Array) -> Array:
    """The nearest bfloat16, as float32."""
    bits = np.asarray(x, f32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), x, rounded.view(f32))


def nudged(x: Array, way: int | None, rng: np.random.Generator, times: float) -> Array:
    """x a little larger (1) or smaller (-1), or each element one or the other by chance (None)."""
    ways = rng.choice([-1, 1], x.shape) if way is None else way
    with np.errstate(all="ignore"):
        return (x * (1.0 + NUDGE * times * ways)).astype(f32)


def swayed(step: Step, p: Array, g: Array, state: dict[str, Array], t: int, nudge: float = 1.0) -> dict[str, Array]:
    """Ulps by which `p` and each state move when gradient and states are nudged: how much of a difference rounding can
    make there. Large where terms cancel; where a sign or a threshold flips, the element is undecided."""
    p1, new1 = step(p, g, state, t)
    first = {"p": p1} | new1
    before = {"p": p} | state
    out = {n: np.zeros(x.shape) for n, x in first.items()}
    rng = np.random.default_rng(3)
    for ways in ((1, 1), (1, -1), (-1, 1), (-1, -1), None, None):
        moved = {n: nudged(x, ways and ways[0], rng, nudge) if x.dtype == f32 else x for n, x in state.items()}
        p2, new2 = step(p, nudged(g, ways and ways[1], rng, nudge), moved, t)
        for n, x in ({"p": p2} | new2).items():
            out[n] = np.maximum(out[n], ulps(x, first[n], before.get(n, x)))
    return out


def wide(dtype: str) -> float:
    """Ulps of float32 that half a unit of the weights' format covers."""
    return 0.0 if dtype == "float32" else 2.0**15


def loose(tier: str) -> float:
    """Ulps within which two roundings of the same equations lie: sums add more, products of matrices much more."""
    return {"T0": 8.0, "T1": 64.0}.get(tier, 2.0**20)
