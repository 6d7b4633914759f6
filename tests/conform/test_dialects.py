"""The settings tell every change apart: from the reference, and from every other change of the same rule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refopt import conform, rules
from refopt.conform.candidates import Candidate, candidates, made
from refopt.conform.diagnose import compare, diagnose
from refopt.conform.measure import ulps
from refopt.conform.record import oracle, record
from refopt.conform.settings import Setting, claimed, data, settings, shapes
from refopt.conform.target import FunctionalTarget

f32 = np.float32
EVERY = [(stem, s) for stem in rules.RULES for s in settings(rules.RULES[stem])]


def spoken(stem: str, setting: Setting, candidate: Candidate) -> FunctionalTarget:
    """A target that takes the steps of a candidate."""
    rule = rules.RULES[stem]

    def update(p: Any, g: Any, s: Any, *, t: int, **hyper: Any) -> Any:
        return candidate.step(p, g, s, t)

    return FunctionalTarget(lambda p, **hyper: rule.init(p, **setting.all), update, candidate.id)


def name(x: Any) -> str:
    return x.label if isinstance(x, Setting) else str(x)


@pytest.mark.parametrize(("stem", "setting"), EVERY, ids=name)
def test_the_reference_conforms_to_itself_to_the_bit(stem: str, setting: Setting) -> None:
    rule = rules.RULES[stem]
    target = FunctionalTarget(rule.init, rule.update)
    run = record(target, rule, setting, data(shapes(rule, setting.all)))
    match = diagnose(run, rule, setting).match
    assert match is not None
    assert match.candidate.id == "canonical"
    assert max(match.worst.values()) == 0


@pytest.mark.parametrize(("stem", "setting"), EVERY, ids=name)
def test_every_change_is_told_from_the_reference(stem: str, setting: Setting) -> None:
    rule = rules.RULES[stem]
    for candidate in candidates(rule, setting.all, 1, 1):
        if candidate.id == "arithmetic-bf16" or candidate.id in SAME.get(stem, ()):
            continue
        some = [(40, 16)] if rule.tier == "T2" else shapes(rule, setting.all)
        run = record(spoken(stem, setting, candidate), rule, setting, data(some))
        found = diagnose(run, rule, setting)
        assert found.match is not None, f"{candidate.id}: {compare(run, rule, setting, candidate).first}"
        assert candidate.id in (found.id, *found.also), f"{candidate.id} is taken for {found.id}"


SAME: dict[str, tuple[str, ...]] = {
    # p (1 - lr wd) - lr u either way: the two differ in their rounding alone
    "adamw": ("decay-order-additive",),
    "lion": ("decay-order-additive",),
    "signum": ("decay-order-additive",),
    "ademamix": ("decay-order-additive",),
}
"""Changes that are the same equations, rounded elsewhere."""


@pytest.mark.parametrize("stem", sorted(SAME))
def test_changes_that_are_only_rounded_elsewhere_are_so(stem: str) -> None:
    rule, setting = rules.RULES[stem], settings(rules.RULES[stem])[0]
    full = rule.check("test", setting.all)
    for candidate in candidates(rule, setting.all, 1, 1):
        if candidate.id in SAME[stem]:
            run = record(spoken(stem, setting, candidate), rule, setting, data(shapes(rule, setting.all)))
            own = compare(run, rule, setting, Candidate((), made(rule, full, ())))
            assert own.ok
            assert 0 < max(own.worst.values()) <= 8


def test_rounding_decides_the_signs_that_are_planted_and_only_those() -> None:
    """Lion by a fused multiply-add: where the momentum is cancelled its sign may differ, and is not held against it."""
    rule, setting = rules.lion, settings(rules.lion)[0]
    b1, o1 = setting.hyper["beta1"], 1 - setting.hyper["beta1"]

    def update(p: Any, g: Any, s: Any, *, t: int, lr: float, beta1: float, beta2: float, wd: float) -> Any:
        step = oracle(rule, setting.all)
        _, states = step(p, g, s, t)
        c = (np.float64(f32(b1)) * s["m"] + np.float64(f32(o1)) * g).astype(f32)
        return p * f32(1 - lr * wd) - f32(lr) * np.sign(c).astype(f32), states

    report = conform.run(FunctionalTarget(rule.init, update), "lion", only=["L1"])
    assert report.ok
    decided = report.findings[0].data["decided_by_rounding"]
    assert 0 < decided < 100


def test_distances_are_in_units_of_what_went_in() -> None:
    one, eps = f32(1), np.spacing(f32(1))
    assert ulps(np.array([one + eps]), np.array([one])) == 1
    assert ulps(np.array([f32(0)]), np.array([eps]), np.array([one])) == 1, "what is left of 1 - 1 has the unit of 1"
    assert ulps(np.array([np.nan], f32), np.array([np.nan], f32)) == 0
    assert ulps(np.array([np.nan], f32), np.array([one])) == np.inf


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("adamv", "adamw"),
        ("adam(decay)", "name=value"),
        ("adam(decay=sideways)", "decay"),
        ("adam(colour=red)", "colour"),
    ],
)
def test_a_claim_that_cannot_be_is_refused_with_its_reason(text: str, says: str) -> None:
    with pytest.raises((ValueError, TypeError), match=says):
        claimed(text)


def test_a_dialect_that_is_claimed_is_what_must_be_followed() -> None:
    target = "refopt.conform.broken:adam_decouples_its_decay"
    assert conform.run(target, "adam(decay=decoupled)", only=["L1"]).ok
    assert conform.run(target, "adam", only=["L1"]).ids == {"decay-decoupled"}
