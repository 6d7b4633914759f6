"""The levels, one function each: a target, a rule and a setting in, findings out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from refopt import codecs, memory
from refopt.conform.candidates import Candidate, made
from refopt.conform.codes import judge
from refopt.conform.codes import named as named_table
from refopt.conform.diagnose import Diagnosis, Match, brief, compare_free, diagnose, pattern
from refopt.conform.forms import named
from refopt.conform.measure import loose, ulps, wide
from refopt.conform.record import Run, begun, free, record, visible
from refopt.conform.report import Finding
from refopt.conform.settings import Data, Setting, data, shapes
from refopt.conform.target import Target
from refopt.spec import Array, Rule
from refopt.step import Optimizer

f32 = np.float32
LONG = range(1, 31)
"""Steps of a free run."""


class Subject:
    """A target under one setting and one format of weights; levels share what it has recorded."""

    def __init__(self, target: Target, rule: Rule, setting: Setting, dtype: str, note: str = "") -> None:
        self.target, self.rule, self.setting, self.dtype, self.note = target, rule, setting, dtype, note
        self.label = setting.label if dtype == "float32" else f"{setting.label}@{dtype}"
        self.data = data(shapes(rule, setting.all))
        self.run: Run | None = None
        self.diagnosis: Diagnosis | None = None

    def finding(self, level: str, status: str, id: str, text: str, **further: Any) -> Finding:
        return Finding(level, self.label, status, id, text, further)

    @property
    def follows(self) -> Candidate | None:
        """The equations that the target was found to follow."""
        return None if self.diagnosis is None or self.diagnosis.match is None else self.diagnosis.match.candidate

    def start(self, some: Data | None = None) -> list[Array]:
        """Begin again; returns the weights as the target holds them."""
        ps = [visible(p, self.dtype) for p in (some or self.data).params]
        self.target.start(self.rule, ps, self.setting.hyper, self.dtype)
        return ps

    def grads(self, t: int) -> list[Array]:
        return [visible(g, self.dtype) for g in self.data.grads(t)]

    def needed(self, k: int) -> dict[str, int]:
        """Bytes of each state of parameter k by the record, in float32; single numbers do not count."""
        opt = Optimizer(self.rule, **self.setting.all)
        shape = self.data.params[k].shape
        forms = self.rule.shapes(shape, self.rule.check("conform", self.setting.all))
        return {n: b for n, b in memory.state_of(opt, shape).items() if forms.get(n) != () or shape == ()}


def smoke(s: Subject) -> list[Finding]:
    """L0: it starts, it steps, weights move and stay finite, gradients are left alone."""
    try:
        ps = s.start()
    except (ValueError, TypeError, NotImplementedError, AssertionError) as error:
        return [s.finding("L0", "skip", "refused", f"refused by the target: {said(error)}")]
    except Exception as error:
        return [s.finding("L0", "fail", "raises-at-start", f"cannot be made: {said(error)}")]
    gs = s.grads(1)
    try:
        s.target.step([g.copy() for g in gs])
        got, changed = s.target.params(), s.target.changed()
    except Exception as error:
        return [fallen(s, error)]
    if odd := misshapen(ps, got):
        return [s.finding("L0", "fail", "raises", odd)]
    out = []
    for k, (p, new) in enumerate(zip(ps, got)):
        if not np.isfinite(new).all():
            out.append(s.finding("L0", "fail", "not-finite", f"tensor {k} has NaN or Inf after one step"))
        elif np.array_equal(p, new):
            out.append(s.finding("L0", "fail", "does-not-move", f"tensor {k} is what it was after one step"))
    if "g" in changed:
        out.append(s.finding("L0", "fail", "gradient-changed", "a step writes into the gradient that it is given"))
    if inputs := [n for n in changed if n != "g"]:
        out.append(s.finding("L0", "fail", "input-changed", f"a pure step writes into its {', '.join(inputs)}"))
    return out or [s.finding("L0", "pass", "", f"one step of {len(ps)} tensors{s.note}")]


def misshapen(ps: list[Array], got: Any) -> str:
    """What `params` gives back that are not float32 arrays of the weights' shapes, in a sentence; "" if they are."""
    if len(got) != len(ps):
        return f"params() gives {len(got)} arrays after one step, for {len(ps)} tensors"
    for k, (p, new) in enumerate(zip(ps, got)):
        if not isinstance(new, np.ndarray) or new.shape != p.shape or new.dtype != f32:
            what = f"{getattr(new, 'dtype', type(new).__name__)} of shape {tuple(getattr(new, 'shape', ()))}"
            return f"tensor {k} is {what} after one step, float32 of shape {p.shape} was expected"
    return ""


def said(error: BaseException) -> str:
    """An exception in one line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:180]}{'...' if len(words) > 180 else ''}"


def fallen(s: Subject, error: BaseException) -> Finding:
    """A first step that raised, and what it had allocated by then."""
    text = f"the first step raises {said(error)}"
    have, need = s.target.nbytes(0), s.needed(0)
    whole = sum(need.values())
    if have is not None and 0 < have < whole and not s.target.coded(0):
        size = s.data.params[0].size
        text += f"; it had allocated {have / size:g} of the {whole / size:g} bytes a parameter that "
        return s.finding("L0", "fail", "half-state", text + f"{', '.join(need)} take", have=have, need=whole)
    option = next((n for n in ("amsgrad", "centered", "nesterov") if s.setting.hyper.get(n)), "")
    return s.finding("L0", "fail", f"{option}-raises" if option else "raises", text)


def rule_level(s: Subject) -> list[Finding]:
    """L1: every step from a known state, beside the reference's and then everyone else's."""
    s.run = record(s.target, s.rule, s.setting, s.data, s.dtype)
    s.diagnosis = d = diagnose(s.run, s.rule, s.setting)
    how = {"forced": "teacher-forced", "read": "from the target's own states", "free": "over a free run"}[s.run.mode]
    note = f" ({s.run.note}: {how})" if s.run.note else f" ({how})"
    forms = named(s.run, s.rule, s.rule.check("conform", s.setting.all)) if s.dtype == "float32" else []
    kept = {"mode": s.run.mode, "forms": [f._asdict() for f in forms]}
    if d.match is None:
        if d.partly:
            return short_block(s, d.partly.candidate, kept | brief(d.canonical))
        if d.parts:
            return two_kernels(s, d.parts, kept | brief(d.canonical))
        id = pattern(s.run, s.rule, s.setting) or "unexplained"
        text = f"nothing documented explains it{note}; first difference: {d.canonical.first}"
        return [s.finding("L1", "fail", id, text, **kept, **brief(d.canonical))]
    text = f"{d.match.candidate.says}, {distance(d.match, s.dtype)}{note}"
    text += "".join(f"; {f}" for f in forms[:1] if not d.match.candidate.changes or "debiased" not in d.id)
    if d.id == "canonical":
        id = "lerp" if any(f.id.startswith("lerp") for f in forms) else ""
        return [s.finding("L1", "pass", id, text, **kept, **brief(d.match))]
    also = f"; so would {' or '.join(d.also)}" if d.also else ""
    first = d.canonical.first
    text += f"{also}. The claim itself first fails at {first}"
    return [s.finding("L1", "fail", d.id, text, **kept, **brief(d.match))]


def short_block(s: Subject, whole: Candidate, kept: dict[str, Any]) -> list[Finding]:
    """For codes: tensors of whole blocks follow something, the others do not; what they follow is a finding too."""
    text = f"tensors whose last block is short are stepped otherwise; in whole blocks: {whole.says}"
    out = [s.finding("L1", "fail", "short-block", text, **kept)]
    return out + ([s.finding("L1", "fail", whole.id, whole.says)] if whole.changes else [])


def two_kernels(s: Subject, parts: tuple[Match, Match], kept: dict[str, Any]) -> list[Finding]:
    """Tensors in codes follow one thing and the others another; each that is not the claim is a finding."""
    coded, others = (m.candidate for m in parts)
    text = f"tensors stored in codes: {coded.says}; those that are not: {others.says}"
    return [s.finding("L1", "fail", c.id, text, **kept) for c in (coded, others) if c.changes]


def distance(m: Match, dtype: str) -> str:
    """The farthest element, in units that fit the weights."""
    if not m.worst or max(m.worst.values()) == 0:
        return "to the bit"
    unit, name = (1.0, "ulps") if dtype == "float32" else (2.0**16, "ulps of bfloat16")
    parts = ", ".join(f"{n} {x / unit:.3g}" for n, x in sorted(m.worst.items()) if math.isfinite(x))
    masked = f"; rounding decides {m.masked} elements" if m.masked else ""
    return f"within {name}: {parts}{masked}"


def trajectory(s: Subject) -> list[Finding]:
    """L2: thirty steps untouched, beside what the target was found to follow; errors have a budget that grows."""
    if s.follows is None:
        return [s.finding("L2", "skip", "", "nothing is known that it follows")]
    if s.dtype == "bfloat16":
        return [s.finding("L2", "skip", "", "weights of eight bits: one rounding that parts two runs is a step long")]
    if s.run is not None and any(taken.codes for taken in s.run.steps):
        return [s.finding("L2", "skip", "", "states are coded: one code that rounding decides parts two runs; see L3")]
    run = free(s.target, s.rule, s.setting, s.data, s.dtype, LONG)
    m = compare_free(run, s.rule, s.setting, s.follows)
    if m.ok:
        budget = loose(s.rule.tier) * len(LONG)
        used = m.worst["p"] / budget
        text = f"{len(LONG)} steps untouched use {used:.0%} of the budget of {budget:g} ulps"
        if used > 1:
            text = f"{len(LONG)} steps untouched part by {m.worst['p']:.3g} ulps, as its approximations may"
        return [s.finding("L2", "pass", "", text, **brief(m))]
    return [s.finding("L2", "fail", "drift", f"a free run leaves its budget: {m.first}", **brief(m))]


def codec_level(s: Subject) -> list[Finding]:
    """L3: codes and scales beside the nearest codes of the states that they stand for."""
    if s.run is None or not any(taken.codes for taken in s.run.steps):
        return [s.finding("L3", "skip", "", "no state is stored as codes that can be read")]
    follows = s.follows or (s.diagnosis.of_codes if s.diagnosis else None)
    if follows is None:
        return [s.finding("L3", "skip", "", "nothing is known that it follows")]
    fresh = tuple(d for d in follows.changes if not d.id.endswith("-bf16"))
    step = made(s.rule, s.rule.check("conform", s.setting.all), fresh)  # what is coded is the state before any rounding
    return [s.finding("L3", *found) for found in judge(s.run, step)]


def place_level(s: Subject) -> list[Finding]:
    """L4: a place changes no bit."""
    twin = s.target.resident()
    if s.target.place is None or twin is None:
        return [s.finding("L4", "skip", "", "the target declares no place: its states are where they always are")]
    ends = []
    for target in (s.target, twin):
        subject = Subject(target, s.rule, s.setting, s.dtype)
        subject.start()
        for t in range(1, 5):
            target.step(s.grads(t))
        ends.append(target.params())
    if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*ends)):
        return [s.finding("L4", "pass", "", f"four steps with place={s.target.place!r} have the bits of four without")]
    return [s.finding("L4", "fail", "place-changes-bits", f"place={s.target.place!r} gives other weights than none")]


def persistence(s: Subject) -> list[Finding]:
    """L5: saved, loaded into a new optimizer, stepped: the bits of a run that was never stopped."""
    s.start()
    for t in (1, 2, 3):
        s.target.step(s.grads(t))
    try:
        saved = s.target.save()
    except Exception as error:
        return [s.finding("L5", "fail", "save-raises", f"saving raises {said(error)}")]
    if saved is None:
        return [s.finding("L5", "skip", "", "the target has no checkpoint")]
    ps, states = s.target.params(), [s.target.state(k) for k in range(len(s.data.params))]
    s.target.step(s.grads(4))
    want = s.target.params()
    try:
        s.target.start(s.rule, ps, s.setting.hyper, s.dtype)
        s.target.load(saved)
        loaded = [s.target.state(k) for k in range(len(ps))]
        s.target.step(s.grads(4))
    except Exception as error:
        return [s.finding("L5", "fail", "load-raises", f"loading, or the step after it, raises {said(error)}")]
    got = s.target.params()
    if all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, want)):
        return [s.finding("L5", "pass", "", "a run that was saved and loaded goes on with the same bits")]
    id, text = lost(s, ps, states, loaded, got)
    return [s.finding("L5", "fail", id, text)]


def lost(s: Subject, ps: list[Array], states: list[Any], loaded: list[Any], got: list[Array]) -> tuple[str, str]:
    """What a checkpoint left behind."""
    gone = {n for a, b in zip(states, loaded) for n in a if n not in b}
    if gone:
        return "state-lost", f"after loading there is no state {', '.join(sorted(gone))}"
    changed = {n for a, b in zip(states, loaded) for n in a if not np.array_equal(a[n], b[n], equal_nan=True)}
    if changed:
        return "state-changed", f"after loading, {', '.join(sorted(changed))} has other values than were saved"
    k, g = 0, s.grads(4)[0]
    if s.follows is not None:
        again = s.follows.step(ps[k], g, begun(s.rule, s.setting.all, ps[k]) | states[k], 1)[0]
        if near(got[k], again, ps[k], s):
            return "t-lost", "after loading, the count of steps begins again: the next step is corrected as the first"
    return "checkpoint-incomplete", "the step after loading differs though every state that can be read came back"


def near(a: Array, b: Array, before: Array, s: Subject) -> bool:
    return bool((ulps(a, b, before) <= loose(s.rule.tier) * 8 + wide(s.dtype)).mean() > 0.99)


def memory_level(s: Subject) -> list[Finding]:
    """L7: bytes of states beside the record's."""
    s.start()
    s.target.step(s.grads(1))
    have = [s.target.nbytes(k) for k in range(len(s.data.params))]
    odd = {n for k in range(len(have)) for n, c in s.target.coded(k).items() if not named_table(c.table)}
    if odd:
        total, size = sum(n or 0 for n in have), sum(p.size for p in s.data.params)
        text = f"{total / size:.4g} bytes a parameter; no record here has the codes of {', '.join(sorted(odd))}"
        return [s.finding("L7", "skip", "", text, have=have)]
    if any(n is None for n in have):
        return [s.finding("L7", "skip", "", "the target does not say how many bytes it keeps")]
    wrong: dict[str, list[str]] = {}
    for k, n in enumerate(have):
        assert n is not None
        size, need = s.data.params[k].size, s.needed(k)
        coded = s.target.coded(k)
        whole = sum(coded_bytes(coded[m], size) if m in coded else b for m, b in need.items())
        if n != whole:
            narrow = s.dtype == "bfloat16" and n * 2 == whole
            lost = ", ".join(need.keys() - s.target.state(k).keys()) if n < whole and uses_all(s) else ""
            id = "state-bf16" if narrow else "more-state" if n > whole else "half-state" if lost else "less-state"
            says = f"tensor {k}: {n / size:.4g} bytes a parameter, {whole / size:.4g} by the record"
            says += ", states being kept in the weights' bfloat16" if narrow else ""
            says += f": no room for {lost}" if lost else ""
            wrong.setdefault(id, []).append(says)
    total, size = sum(n for n in have if n is not None), sum(p.size for p in s.data.params)
    ok = f"{total / size:.4g} bytes a parameter, as the record says for {', '.join(s.needed(0)) or 'no state'}"
    out = [s.finding("L7", "fail", id, "; ".join(says), have=have) for id, says in wrong.items()]
    return out or [s.finding("L7", "pass", "", ok, have=have)]


def uses_all(s: Subject) -> bool:
    """Whether no state is known to be ignored."""
    return s.dtype == "float32" and not (s.follows and "ignored" in s.follows.id)


def coded_bytes(c: Any, size: int) -> int:
    """Bytes of a state by the record of the codec that has such a table: codes, and a scale a block."""
    stem = named_table(c.table).partition(" ")[0]
    codec = codecs.CODECS[stem if stem in ("q4", "compand8") else "dynamic8"]
    return codec(block=c.block, layout="flat").nbytes((size,))
