"""L6: gradients and weights that are zero, tiny, huge, infinite or NaN, beside what the target was found to follow."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from refopt.conform.diagnose import slackened
from refopt.conform.levels import Subject
from refopt.conform.measure import loose, ulps, unit, wide
from refopt.conform.record import begun, shaped, visible
from refopt.conform.report import Finding
from refopt.conform.settings import Data
from refopt.spec import Array

f32 = np.float32

SPECIAL: dict[str, list[float]] = {
    "zero": [0.0, -0.0],
    "subnormal": [1e-40, -1e-42],
    "tiny": [1e-30, -1e-25],
    "huge": [1e18, -1e19],
    "infinite": [math.inf, -math.inf],
    "nan": [math.nan],
}


def special(s: Subject) -> list[Finding]:
    """L6: gradients that are zero, subnormal, huge, infinite or NaN, a few among ordinary ones; tensors of zeros."""
    if s.follows is None:
        return [s.finding("L6", "skip", "", "nothing is known that it follows")]
    if s.rule.tier == "T2":
        return [s.finding("L6", "skip", "", "products of matrices spread one element over all")]
    out = [f for name, values in SPECIAL.items() for f in one_special(s, name, values)]
    out += [f for name in WHOLE for f in one_whole(s, name)]
    return out or [s.finding("L6", "pass", "", f"{', '.join([*SPECIAL, *WHOLE])}: as the equations have it")]


WHOLE = {
    "zero-weights": (0.0, 1.0),
    "zero-gradients": (1.0, 0.0),
    "faint-gradients": (1.0, 1e-16),
    "nan-weight": (1.0, 1.0),
}
"""What all weights, and all gradients, are multiplied by."""


def one_whole(s: Subject, name: str) -> list[Finding]:
    """Two steps of tensors that are special as a whole."""
    assert s.follows is not None
    weights, slopes = (f32(x) for x in WHOLE[name])
    ps = [p * weights for p in s.data.params]
    if name == "nan-weight":
        for p in ps:
            p.reshape(-1)[min(7, p.size - 1) :][:1] = np.nan
    ps = s.start(Data(ps, s.data.sizes))
    states = [begun(s.rule, s.setting.all, p) for p in ps]
    for t in (1, 2):
        gs = [visible(g * slopes, s.dtype) for g in s.grads(t)]
        s.target.step([g.copy() for g in gs])
        for k, (p, g) in enumerate(zip(ps, gs)):
            want, new = s.follows.step(p, g, states[k], t)
            got = s.target.params()[k]
            bad = ~(ulps(got, want, p) <= bound(s, p, want, t)).reshape(-1)
            if bad.mean() > 0.1 or (bad & np.isnan(want.reshape(-1))).any():
                i = int(np.flatnonzero(bad)[0])
                shown = f"step {t}, tensor {k}, p[{i}] becomes {got.reshape(-1)[i]:.6g}"
                return [s.finding("L6", "fail", name, f"{shown}, by the equations {want.reshape(-1)[i]:.6g}")]
            if off := states_off(s, k, states[k], new):
                return [s.finding("L6", "fail", off.id or name, f"step {t}, tensor {k}: {off.text}")]
            states[k] = new | shaped(s.target.state(k), new)
        ps = s.target.params()
    return []


def one_special(s: Subject, name: str, values: list[float]) -> list[Finding]:
    """The second step with special gradients; the first is ordinary, so that states are not zero."""
    assert s.follows is not None
    ps = s.start()
    gs = s.grads(1)
    s.target.step([g.copy() for g in gs])
    states = [begun(s.rule, s.setting.all, p) for p in ps]
    pairs = zip(ps, gs, states)
    states = [s.follows.step(p, g, x, 1)[1] for p, g, x in pairs]
    states = [x | shaped(s.target.state(k), x) for k, x in enumerate(states)]
    ps, gs = s.target.params(), s.grads(2)
    for g in gs:
        at = places(g.size, values)
        g.reshape(-1)[at] = visible(np.array(values, f32), s.dtype)[: at.size]
    s.target.step([g.copy() for g in gs])
    for k, (p, g) in enumerate(zip(ps, gs)):
        want, new = s.follows.step(p, g, states[k], 2)
        got = s.target.params()[k]
        here = np.zeros(p.size, bool)
        here[places(p.size, values)] = True
        bad = ~(ulps(got, want, p) <= bound(s, p, want, 2)).reshape(-1)
        ruled = bool(s.target.coded(k)) and name in ("infinite", "nan", "huge")  # a scale that a block shares
        if ruled:
            bad &= here
        if bad[here].any() or (s.rule.scope == "element" and bad.mean() > 0.02):
            i = int(np.flatnonzero(bad)[0])
            shown = f"g = {g.reshape(-1)[i]:.6g}: p {p.reshape(-1)[i]:.6g} becomes {got.reshape(-1)[i]:.6g}"
            shown += " (left as it was)" if got.reshape(-1)[i] == p.reshape(-1)[i] else ""
            return [s.finding("L6", "fail", f"special-{name}", f"{shown}, by the equations {want.reshape(-1)[i]:.6g}")]
        if off := states_off(s, k, states[k], new, ruled):
            return [s.finding("L6", "fail", off.id or f"special-{name}", off.text)]
    return []


def places(size: int, values: list[float]) -> Array:
    """Where special values stand in a tensor: every fourth element from the fourth on, as far as there are any."""
    return np.arange(3, size, 4)[: len(values)]


def bound(s: Subject, p: Array, want: Array, t: int) -> Any:
    """Ulps that weights may be apart where values are extreme."""
    assert s.follows is not None
    rough = loose(s.rule.tier) * 2 + wide(s.dtype) + s.follows.freely
    return rough + slackened(s.rule, s.setting, s.follows, p, want, t) / unit(want, p)


class Off(NamedTuple):
    """What a state has instead, and the diagnosis where it has one of its own."""

    text: str
    id: str = ""


def states_off(s: Subject, k: int, before: dict[str, Array], new: dict[str, Array], ruled: bool = False) -> Off | None:
    """Which state of parameter k is a number where the equations have none, or the other way, or is another number.

    `ruled`: some elements are so large that codes of their neighbours are rightly zero.
    """
    have = shaped(s.target.state(k), new)
    for n in sorted(have.keys() & s.target.coded(k).keys()) if not ruled else ():
        lost = (np.abs(new[n]) > TINY) & (have[n] == 0)
        if lost.mean() > 0.9:
            return Off(f"state {n} is stored as zero where the equations have {new[n][lost].flat[0]:.3g}", "state-lost")
    for n in sorted(have.keys() & new.keys() - s.target.coded(k).keys()):
        got, want = np.isfinite(have[n]), np.isfinite(new[n])
        if (got != want).any():
            return Off(f"state {n} has {int((~got).sum())} NaN or Inf, by the equations {int((~want).sum())}")
        limit = loose(s.rule.tier) * 2 + (s.follows.loose if s.follows else 0.0)
        off = want & ~(ulps(have[n], new[n], before[n]) <= limit)
        if off.any() and (have[n][off] == 0).all() and (np.abs(new[n][off]) < TINY).all():
            return Off(
                f"state {n} is 0 where the equations have {new[n][off].flat[0]:.3g}: no subnormals", "no-subnormals"
            )
        if off.mean() > 0.1 and not (s.follows and s.follows.freely):
            return Off(f"state {n} has other values than the equations")
    return None


TINY = 2.0**-126
"""The least float32 that is normal."""
