"""The database of cases is complete: nothing enters the package without the laws seeing it."""

from __future__ import annotations

from types import ModuleType

import pytest

from tests.cases import CODECS, EVERY, RULES, STEMS, WEIGHTS, RuleCase, label
from tests.golden import exact


def test_every_rule_and_every_codec_has_a_case(ref: ModuleType) -> None:
    assert {c.stem for c in EVERY} == set(ref.rules.RULES)
    assert {c.stem for c in RULES} == set(exact.RULES)
    assert {c.stem for c in [*CODECS, *WEIGHTS]} == set(ref.codecs.CODECS) >= {*STEMS, *exact.CODECS}
    assert {c.stem for c in WEIGHTS} == {s for s, c in ref.codecs.CODECS.items() if c.weights}


def test_every_hyper_parameter_leaves_its_default_in_some_case(ref: ModuleType) -> None:
    for stem, rule in ref.rules.RULES.items():
        for h in rule.hypers:
            assert any(c.hyper.get(h.name, h.default) != h.default for c in EVERY if c.stem == stem), f"{stem} {h.name}"


@pytest.mark.parametrize("case", RULES, ids=label)
def test_no_case_lies_where_two_rules_coincide(case: RuleCase) -> None:
    assert case.hyper["wd"] > 0 and case.hyper["lr"] > 0
    assert case.hyper.get("beta1", 0) != case.hyper.get("beta2", 1)
