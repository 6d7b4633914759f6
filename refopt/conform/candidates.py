"""Steps to compare a run with: the reference's, each dialect alone, two of them at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from refopt.conform.changes import Hyper, Make, plain
from refopt.conform.dialects import Dialect, every
from refopt.conform.measure import Step
from refopt.spec import Rule


class Candidate(NamedTuple):
    """A step with none, one or two changes."""

    changes: tuple[Dialect, ...]
    step: Step

    @property
    def id(self) -> str:
        return "+".join(d.id for d in self.changes) or "canonical"

    @property
    def says(self) -> str:
        return "; ".join(d.says for d in self.changes) or "the reference's equations"

    @property
    def loose(self) -> float:
        """Ulps that states may be apart beside those of the rule."""
        return max((d.loose for d in self.changes), default=0.0)

    def slack(self, hyper: Hyper, t: int) -> float:
        """The share of step t's length that approximations may take or add."""
        return max((d.slack(hyper, t) for d in self.changes if d.slack), default=0.0)

    @property
    def freely(self) -> float:
        """Ulps that weights may be apart too, where the arithmetic itself has few bits."""
        return max((d.loose for d in self.changes if d.id == "arithmetic-bf16"), default=0.0)


def made(rule: Rule, hyper: Hyper, changes: tuple[Dialect, ...]) -> Step:
    """The step of a rule under changes, the last one outermost."""
    make: Make = plain
    for d in changes:
        make = (lambda inner, around: lambda r, h: around(inner, r, h))(make, d.around)
    return make(rule, hyper)


def candidates(rule: Rule, hyper: Hyper, least: int = 1, most: int = 2) -> Iterator[Candidate]:
    """Every step with `least` to `most` changes that fit the rule; those that the record refuses are left out."""
    full = rule.check("conform", hyper)
    fitting = [d for d in every() if d.when(rule, full) and not moot(d.id, rule, full)]
    for d in fitting if least <= 1 else ():
        yield from tried(rule, full, (d,))
    for i, a in enumerate(fitting if most >= 2 else ()):
        for b in fitting[i + 1 :]:
            if topic(a) != topic(b):
                yield from tried(rule, full, (a, b))


def moot(id: str, rule: Rule, hyper: Hyper) -> bool:
    """Changes that change nothing under these hyper-parameters."""
    if id in ("decay-decoupled", "lr-inside") and rule.stem == "sgd":
        return not hyper["momentum"]  # without a buffer lr multiplies all of it, either way
    if id.endswith("-bf16"):
        return not rule.states_for(**hyper)
    if id == "one-minus-beta-f32":
        return rule.tier == "T2"  # products of matrices differ by more
    if id == "variant-apex":
        return bool(hyper["wd"])
    return rule.stem == "muon" and id.startswith("eps-")  # the norm of a matrix is far from any eps


def topic(d: Dialect) -> str:
    """Changes of one thing are not tried together."""
    words = {"signum": "decay-rule", "arithmetic": "bf16", "state": "bf16", "bias": "bias", "no": "bias"}
    first = d.id.split("-")[0]
    return words.get(first, first)


def tried(rule: Rule, full: Hyper, changes: tuple[Dialect, ...]) -> Iterator[Candidate]:
    try:
        yield Candidate(changes, made(rule, full, changes))
    except (ValueError, TypeError, KeyError):
        return
