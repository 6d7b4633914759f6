"""Which equations a run follows: the reference's, a dialect's, a known mistake's; or where it first parts from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refopt.conform.candidates import Candidate, candidates, made
from refopt.conform.measure import BACKWARD, DECIDED, Step, bf16, loose, swayed, ulps, unit, wide
from refopt.conform.record import Run, Taken, begun
from refopt.conform.settings import Setting
from refopt.spec import Array, Rule

FEW = 0.02
"""The largest share of elements that rounding may excuse before a comparison says nothing."""
MANY = 0.1
"""The same where the arithmetic has eight bits."""
MATRICES = 0.02
"""How far the step of a rule that multiplies matrices may lie from the reference's, beside its length."""

COARSE = 2.0**15
"""How much more bfloat16 arithmetic nudges its inputs than float32 does, halved: a unit of its last place each."""
PRODUCTS = 4096.0
"""Ulps that the states of such a rule may be apart."""


Limits = dict[str, Any]
"""Ulps that each array may be off by: a number, or one an element."""


class Place(NamedTuple):
    """Where a run first differs: its step, tensor, array and element, what went in, what came out."""

    t: int
    k: int
    name: str
    element: int
    got: float
    want: float
    inputs: dict[str, float]
    share: float

    def __str__(self) -> str:
        went = ", ".join(f"{n}={x:.9g}" for n, x in self.inputs.items())
        where = f"step {self.t}, tensor {self.k}, {self.name}[{self.element}]"
        return f"{where}: got {self.got:.9g}, expected {self.want:.9g} from {went}; {self.share:.1%} of elements differ"


class Match(NamedTuple):
    """How a run compares with a candidate: the farthest element in ulps, the share of equal bits, by array."""

    candidate: Candidate
    worst: dict[str, float]
    equal: dict[str, float]
    masked: int
    first: Place | None

    @property
    def ok(self) -> bool:
        return self.first is None


def compare(run: Run, rule: Rule, setting: Setting, candidate: Candidate, hasty: bool = False) -> Match:
    """Every step of a run beside a candidate's; `hasty` leaves at the first difference."""
    if run.mode == "free":
        return compare_free(run, rule, setting, candidate, hasty)
    far: dict[str, list[Array]] = {}
    masked, first = 0, None
    for taken in run.steps:
        assert taken.before is not None
        want_p, want = candidate.step(taken.p, taken.g, taken.before, taken.t)
        apart, limits = distances(run, rule, setting, candidate, taken, want_p, want)
        nudge = COARSE if candidate.freely else 1.0
        mask, place = judged(candidate.step, taken, taken.before, apart, limits, {"p": want_p} | want, nudge)
        masked += mask
        for n, x in apart.items():
            far.setdefault(n, []).append(x.reshape(-1))
        first = first or place
        if hasty and first:
            break
    return summed(candidate, far, masked, first)


def summed(candidate: Candidate, far: dict[str, list[Array]], masked: int, first: Place | None) -> Match:
    joined = {n: np.concatenate(xs) for n, xs in far.items()}
    worst = {n: float(x.max(initial=0.0)) for n, x in joined.items()}
    return Match(candidate, worst, {n: float((x == 0).mean()) for n, x in joined.items() if x.size}, masked, first)


def distances(
    run: Run,
    rule: Rule,
    setting: Setting,
    candidate: Candidate,
    taken: Taken,
    want_p: Array,
    want: dict[str, Array],
    steps: int = 1,
) -> tuple[dict[str, Array], Limits]:
    """Ulps of weights and states, those of elements that rounding decides set to 0; and what each may be."""
    rough = loose(rule.tier)
    apart = {"p": ulps(taken.after_p, want_p, taken.p, want_p - taken.p)}
    limits: Limits = {"p": (rough + wide(run.dtype) + candidate.freely) * steps}
    if steps == 1:
        slack = slackened(rule, setting, candidate, taken.p, want_p, taken.t)
        limits["p"] = limits["p"] + slack / unit(want_p, taken.p, want_p - taken.p)
    if rule.tier == "T2":
        moved, off = np.linalg.norm(want_p - taken.p), np.linalg.norm(taken.after_p - want_p)
        apart["p"] = np.full(want_p.shape, off / (moved + 1e-30) / MATRICES * rough)
    for n in want.keys() & taken.after.keys() if steps == 1 else ():
        old = (taken.before or {}).get(n, want[n])
        apart[n] = ulps(taken.after[n].reshape(want[n].shape), want[n], old)
        limits[n] = (rough if rule.tier != "T2" else PRODUCTS) + candidate.loose
    return apart, limits


def slackened(rule: Rule, setting: Setting, candidate: Candidate, p: Array, want: Array, t: int) -> Any:
    """How far a candidate's approximations may move each weight in step t."""
    share = candidate.slack(rule.defaults() | setting.all, t)
    if not share:
        return 0.0
    with np.errstate(all="ignore"):
        moved = np.abs(want.astype(np.float64) - p)
    return share * np.where(np.isfinite(moved), moved, 0.0)


def judged(
    step: Step,
    taken: Taken,
    before: dict[str, Array],
    apart: dict[str, Array],
    limits: Limits,
    want: dict[str, Array],
    nudge: float = 1.0,
) -> tuple[int, Place | None]:
    """Elements beyond their limit by no more than rounding can sway them are set to 0; those of them that rounding
    decides altogether are counted. The first element that is further off, if one is."""
    if all((apart[n] <= limits[n]).all() for n in apart):
        return 0, None
    sway = swayed(step, taken.p, taken.g, before, taken.t, nudge)
    masked = 0
    for n in apart:
        hit = (apart[n] > limits[n]) & (apart[n] <= limits[n] + BACKWARD * sway[n])
        if hit.sum() > max((FEW if nudge < COARSE else MANY) * hit.size, 4):
            continue
        masked += int((hit & (sway[n] > DECIDED)).sum())
        apart[n][hit] = 0.0
    return masked, first_of(taken, before, apart, limits, want)


def first_of(
    taken: Taken, before: dict[str, Array], apart: dict[str, Array], limits: Limits, want: dict[str, Array]
) -> Place | None:
    """The worst element of the first array that has one beyond its limit, the states before the weights."""
    for n in sorted(apart, key=lambda n: n == "p"):
        bad = ~(apart[n] <= limits[n]).reshape(-1)
        if bad.any():
            i = int(np.argmax(bad))
            got = (taken.after_p if n == "p" else taken.after[n]).reshape(-1)[i]
            inputs = {"p": taken.p, "g": taken.g} | before
            shown = {m: float(x.reshape(-1)[i]) for m, x in inputs.items() if x.size == apart[n].size}
            wanted = float(want[n].reshape(-1)[i])
            return Place(taken.t, taken.k, n, i, float(got), wanted, shown, float(bad.mean()))
    return None


def compare_free(run: Run, rule: Rule, setting: Setting, candidate: Candidate, hasty: bool = False) -> Match:
    """A whole run beside a candidate's, both from the first weights on. The budget grows by each step's limit, in units
    of the largest value that a weight has had; what rounding decided once stays out."""
    far: dict[str, list[Array]] = {}
    ps: dict[int, Array] = {}
    states: dict[int, dict[str, Array]] = {}
    doubtful: dict[int, Array] = {}
    largest: dict[int, Array] = {}
    slack: dict[int, Any] = {}
    masked, first = 0, None
    for taken in run.steps:
        k = taken.k
        p = ps.get(k, taken.p)
        before = states.get(k) or begun(rule, setting.all, p)
        doubtful.setdefault(k, np.zeros(p.shape, bool))
        ps[k], states[k] = candidate.step(p, taken.g, before, taken.t)
        largest[k] = np.fmax(largest.get(k, np.abs(p)), np.fmax(np.abs(ps[k]), np.abs(ps[k] - p)))
        seen = taken._replace(p=p)
        apart, limits = distances(run, rule, setting, candidate, seen, ps[k], states[k], taken.t)
        apart = {"p": apart["p"]}
        slack[k] = slack.get(k, 0.0) + slackened(rule, setting, candidate, p, ps[k], taken.t)
        limits["p"] = limits["p"] + slack[k] / unit(largest[k])
        apart["p"] = np.where(doubtful[k], 0.0, ulps(taken.after_p, ps[k], largest[k]))
        beyond = apart["p"] > limits["p"]
        mask, place = judged(candidate.step, seen, before, apart, limits, {"p": ps[k]}, 16.0)
        doubtful[k] |= beyond & (apart["p"] == 0)
        masked += mask
        far.setdefault("p", []).append(apart["p"].reshape(-1))
        first = first or place
        if hasty and first:
            break
    return summed(candidate, far, masked, first)


class Diagnosis(NamedTuple):
    """What was found: the match that holds, or none; and how the reference itself compares."""

    canonical: Match
    match: Match | None
    also: tuple[str, ...] = ()
    """Other changes that explain the run as well."""
    partly: Match | None = None
    """Where nothing explains the whole run: what explains the tensors that are whole blocks."""
    parts: tuple[Match, Match] | None = None
    """Where not even that: what explains the tensors stored in codes, and what those that are not."""

    @property
    def id(self) -> str:
        return "unexplained" if self.match is None else self.match.candidate.id

    @property
    def of_codes(self) -> Candidate | None:
        """What explains tensors stored in codes where nothing explains all."""
        found = self.partly or (self.parts[0] if self.parts else None)
        return found.candidate if found else None


def diagnose(run: Run, rule: Rule, setting: Setting) -> Diagnosis:
    """The reference, then every change alone, then two at a time; the first that holds, and what else does."""
    full = rule.check("conform", setting.all)
    own = compare(run, rule, setting, Candidate((), made(rule, full, ())))
    if own.ok:
        return Diagnosis(own, own)
    roughly: list[Candidate] = []
    for least, most in ((1, 1), (2, 2)):
        tried = candidates(rule, full, least, most)
        held = [c for c in tried if may(run, c) and holds(run, rule, setting, c)]
        roughly += [c for c in held if c.freely]
        held = [c for c in held if not c.freely]
        if held:
            return Diagnosis(own, compare(run, rule, setting, held[0]), tuple(c.id for c in held[1:]))
    if roughly:
        return Diagnosis(own, compare(run, rule, setting, roughly[0]), ())
    partly = in_whole_blocks(run, rule, setting)
    return Diagnosis(own, None, partly=partly, parts=None if partly else by_storage(run, rule, setting))


BLOCK = 256
"""Elements a scale, in the codecs that people use; theirs that have fewer divide it."""


def in_whole_blocks(run: Run, rule: Rule, setting: Setting) -> Match | None:
    """For states that are coded: what explains the tensors that have no short block, if some have one."""
    whole = [taken for taken in run.steps if taken.p.size % BLOCK == 0]
    if not whole or len(whole) == len(run.steps) or not any(taken.codes for taken in whole):
        return None
    return diagnose(run._replace(steps=whole), rule, setting).match


def by_storage(run: Run, rule: Rule, setting: Setting) -> tuple[Match, Match] | None:
    """What explains the tensors whose states are coded, and what the others: libraries have a kernel for each."""
    coded = [taken for taken in run.steps if taken.codes]
    others = [taken for taken in run.steps if not taken.codes]
    if not coded or not others:
        return None
    a, b = (diagnose(run._replace(steps=steps), rule, setting).match for steps in (coded, others))
    return (a, b) if a and b else None


def may(run: Run, candidate: Candidate) -> bool:
    """Whether what the target stores allows a candidate: states kept in bfloat16 end in sixteen zero bits."""
    if not any(d.id.endswith("-bf16") for d in candidate.changes):
        return True
    kept = [x for taken in run.steps for x in taken.after.values() if x.dtype == np.float32]
    return bool(kept) and all(np.array_equal(bf16(x), x, equal_nan=True) for x in kept)


def holds(run: Run, rule: Rule, setting: Setting, candidate: Candidate) -> bool:
    """Whether a candidate explains every step; one that cannot be run does not."""
    try:
        return compare(run, rule, setting, candidate, hasty=True).ok
    except (KeyError, ValueError, TypeError, ZeroDivisionError):
        return False


def pattern(run: Run, rule: Rule, setting: Setting) -> str:
    """For a run that nothing explains: what the differing elements have in common, as an id, or ""."""
    full = rule.check("conform", setting.all)
    step = made(rule, full, ())
    shares, tails, still = [], [], []
    for taken in run.steps:
        if taken.before is None:
            return ""
        want, _ = step(taken.p, taken.g, taken.before, taken.t)
        bad = (ulps(taken.after_p, want, taken.p) > loose(rule.tier) + wide(run.dtype)).reshape(-1)
        shares.append((taken.t, bad.any()))
        if bad.any():
            at = np.flatnonzero(bad)
            tails.append((at[0] >= bad.size // 2 or bad.size < 256) and bad[at[0] :].mean() > 0.9)
            still.append((taken.after_p.reshape(-1)[at] == taken.p.reshape(-1)[at]).all())
    if tails and all(tails):
        return "tail-untouched" if all(still) else "tail"
    if still and all(still):
        return "not-moved"
    early = {t for t, bad in shares if bad}
    return "first-step" if early == {1} else "after-first-step" if early and 1 not in early else ""


def brief(match: Match) -> dict[str, Any]:
    """A match as plain data."""
    return {"worst_ulps": match.worst, "equal_bits": match.equal, "decided_by_rounding": match.masked}
