"""Host: gradients go down, weights come up, states stay; no bit changes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import parts
from tests.cases import EVERY, RuleCase, label
from tests.places.laws import keeps_its_schedule, observed, same_run, some_codecs
from tests.strategies import SHAPES, f32, runs

SIZES = [(5, 3), (700,), (3, 40)]


@pytest.mark.parametrize("case", EVERY, ids=label)
@given(data=st.data())
def test_stepping_on_the_host_changes_no_bit(ref: ModuleType, case: RuleCase, data: Any) -> None:
    run = data.draw(runs(shapes=case.shapes or SHAPES))
    same_run(ref, case, ref.places.host, run, some_codecs(ref, case, data))


@pytest.mark.parametrize("weights", ["f32", "bf16"])
@pytest.mark.parametrize("case", EVERY, ids=label)
def test_the_moves_are_those_of_the_schedule(ref: ModuleType, case: RuleCase, weights: str) -> None:
    keeps_its_schedule(ref, case, ref.places.host, list(case.shapes) or SIZES, {"p": weights})


@pytest.mark.parametrize("case", EVERY, ids=label)
def test_no_state_crosses_the_link(ref: ModuleType, case: RuleCase) -> None:
    """The gradient is float32 here, 4 bytes; weights in bfloat16 come back as 2."""
    opt = case.optimizer(ref, {"p": "bf16"}, "host")
    params = [np.ones(shape, f32) for shape in list(case.shapes) or SIZES]
    seen, _ = observed(opt, params, params)
    assert [m.way for m in seen] == ["device>host", "host>device"] * len(params)
    for k, p in enumerate(params):
        assert [m.bytes for m in seen[2 * k : 2 * k + 2]] == [4 * p.size, 2 * p.size]


def test_the_device_holds_weights_and_one_gradient_the_host_the_rest(ref: ModuleType) -> None:
    opt = ref.Optimizer("adamw", {"m": "dynamic8", "v": "dynamic8", "p": "bf16"}, "host")
    params = [np.ones(n, f32) for n in (1000, 3000)]
    states = sum(a.nbytes for s in opt.init(params) for n in "mv" for a in parts(s[n]).values())
    assert opt.peak(params) == (2 * 4000 + 4 * 3000, 2 * 4000 + 4 * 4000 + states, 0)
