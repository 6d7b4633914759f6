"""The suite judged: wrong versions of the reference's own rules, as targets. Each must be seen by L1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refopt import rules
from refopt.conform.candidates import Candidate, made
from refopt.conform.diagnose import Diagnosis, compare
from refopt.conform.levels import Subject, smoke
from refopt.conform.record import record
from refopt.conform.settings import Setting, data, settings, shapes
from refopt.conform.special import special
from refopt.conform.target import FunctionalTarget
from tests.cases import EVERY
from tests.conftest import todays
from tests.mutants import MUTANTS
from tests.mutants.load import Mutant, copied, package

OTHER = {
    "sgd-nesterov-unchecked": "what is refused",
    "galore-rank-cut-in-silence": "what is refused",
    "ademamix-log-of-zero": "what is refused",
    "lamb-bounds-may-cross": "what is refused",
    "adam_mini-heads-summed-flat": "the order of a sum in float64, which nearly always rounds to the same float32",
    "apollo-one-projection-for-all-tensors": "random numbers, which a target draws for itself",
    "schedule-free-weight-of-the-current-rate": "a step after the rate has changed; the suite keeps it",
    "schedule-free-average-the-other-way": "the average that is shown, not a step",
}
"""Mutants of a rule's file that change no step that the suite takes, and what they change."""

ADAM = {"lr": 0.013, "beta1": 0.8, "beta2": 0.9973, "eps": 1e-7, "wd": 0.11}
EXTRA: dict[str, list[Setting]] = {
    "lars": [
        Setting("long", {"lr": 0.7, "trust": 30.0, "momentum": 0.85, "wd": 0.07}),
        Setting("uncut", {"lr": 0.05, "wd": 0.07, "variant": "clip", "max_unorm": 50.0}),
    ],
    "lamb": [Setting("uncut", ADAM | {"variant": "clip", "max_unorm": 50.0})],
    "schedule_free": [Setting("still", ADAM | {"lr": 0.0})],
    "adamw": [Setting("additive", ADAM | {"decay_order": "additive"})],
    "rmsprop": [Setting("forgetful", {"lr": 0.013, "alpha": 1e-8, "eps": 0.1, "centered": True})],
    "adam_mini": [Setting("heads", ADAM | {"blocks": "heads", "heads": 2})],
}
"""Claims at values that the suite's settings do not have: steps longer than the paper's, no cut, no rate."""

OF_RULES = [m for m in MUTANTS if m.file.startswith("rules/") and m.file != "rules/__init__.py"]


def stem_of(m: Mutant) -> str:
    return Path(m.file).stem


def asked(stem: str) -> list[tuple[Setting, list[tuple[int, ...]]]]:
    """The suite's own settings of a rule, and those of the database of cases: every option of it."""
    rule = rules.RULES[stem]
    own = [(s, shapes(rule, s.all)) for s in settings(rule)]
    cases = [c for c in EVERY if c.stem == stem]
    extra = [(x, [(4, 3, 300), (2, 600)] if stem == "adam_mini" else shapes(rule, x.all)) for x in EXTRA.get(stem, ())]
    return own + extra + [(Setting(c.label, c.hyper), list(c.shapes or ((5, 40), (31,)))) for c in cases]


def seen(m: Mutant, home: Path) -> str:
    """Where a mutant is not the reference to the bit, raises, or fails at L0 or L6; "" if nowhere."""
    stem = stem_of(m)
    rule = rules.RULES[stem]
    with package(copied(home / "mutant", m)) as ref:
        wrong = ref.rules.RULES[stem]
    for setting, some in asked(stem):
        full = rule.check("test", setting.all)
        same = Candidate((), made(rule, full, ()))
        target = FunctionalTarget(wrong.init, wrong.update)
        subject = Subject(target, rule, setting, "float32")
        subject.data = data(some)
        try:
            match = compare(record(target, rule, setting, subject.data), rule, setting, same)
            if match.first or max(match.worst.values(), default=0) > 0:
                return setting.label
            subject.diagnosis = Diagnosis(match, match)
            failed = [f.key for f in (*smoke(subject), *special(subject)) if f.status == "fail"]
        except (ValueError, TypeError, KeyError, IndexError, FloatingPointError) as error:
            return f"{setting.label}: {error}"
        if failed and not setting.label == "still":
            return failed[0]
    return ""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_mutant_of_a_rule_is_seen(tmp_path: Path, capsys: Any) -> None:
    chosen = [m for m in todays(OF_RULES) if m.label not in OTHER]
    with np.errstate(all="ignore"):
        alive = [m.label for m in chosen if not seen(m, tmp_path)]
    with capsys.disabled():
        print(f"\nconform kills {len(chosen) - len(alive)} of {len(chosen)} mutants of the rules", end="")
    assert not alive


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("stem", rules.RULES)
def test_the_reference_itself_is_not_seen(stem: str, tmp_path: Path) -> None:
    """Otherwise a kill would prove nothing."""
    with np.errstate(all="ignore"):
        whole = Mutant("none", f"rules/{stem}.py", f'stem="{stem}"', f'stem="{stem}"', "")
        assert not seen(whole, tmp_path)


def test_mutants_that_are_not_asked_for_change_no_step() -> None:
    assert OTHER.keys() <= {m.label for m in OF_RULES}
