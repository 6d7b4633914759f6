"""The suite judged: wrong versions of the reference's own rules, as targets. Each must be seen by L1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refopt import rules
from refopt.conform.diagnose import compare
from refopt.conform.dialects import Candidate, made
from refopt.conform.record import record
from refopt.conform.settings import Setting, data, settings, shapes
from refopt.conform.target import FunctionalTarget
from tests.cases import EVERY
from tests.mutants import MUTANTS
from tests.mutants.load import Mutant, copied, package

OTHER: dict[str, str] = {}
"""Mutants of a rule's file that change no step, and what they change."""

OF_RULES = [m for m in MUTANTS if m.file.startswith("rules/") and m.file != "rules/__init__.py"]


def stem_of(m: Mutant) -> str:
    return Path(m.file).stem


def asked(stem: str) -> list[tuple[Setting, list[tuple[int, ...]]]]:
    """The suite's own settings of a rule, and those of the database of cases: every option of it."""
    rule = rules.RULES[stem]
    own = [(s, shapes(rule, s.all)) for s in settings(rule)]
    cases = [c for c in EVERY if c.stem == stem]
    return own + [(Setting(c.label, c.hyper), list(c.shapes or ((5, 40), (31,)))) for c in cases]


def seen(m: Mutant, home: Path) -> str:
    """The setting under which a mutant is not the reference to the bit, or raises; "" if there is none."""
    stem = stem_of(m)
    rule = rules.RULES[stem]
    with package(copied(home / "mutant", m)) as ref:
        wrong = ref.rules.RULES[stem]
    for setting, some in asked(stem):
        full = rule.check("test", setting.all)
        try:
            run = record(FunctionalTarget(wrong.init, wrong.update), rule, setting, data(some))
            match = compare(run, rule, setting, Candidate((), made(rule, full, ())))
        except (ValueError, TypeError, KeyError, IndexError, FloatingPointError) as error:
            return f"{setting.label}: {error}"
        if match.first or max(match.worst.values(), default=0) > 0:
            return setting.label
    return ""


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_every_mutant_of_a_rule_is_seen(tmp_path: Path, capsys: Any) -> None:
    chosen = [m for m in OF_RULES if m.label not in OTHER]
    with np.errstate(all="ignore"):
        alive = [m.label for m in chosen if not seen(m, tmp_path)]
    with capsys.disabled():
        print(f"\nconform kills {len(chosen) - len(alive)} of {len(chosen)} mutants of the rules", end="")
    assert not alive


def test_mutants_that_are_not_asked_for_change_no_step() -> None:
    assert OTHER.keys() <= {m.label for m in OF_RULES}
