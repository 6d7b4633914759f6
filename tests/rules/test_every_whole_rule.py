"""Laws that every rule of whole tensors obeys: symmetry, shapes, no mutation, one tensor at a time, reads."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state, unsigned_zero
from tests.cases import WHOLE, RuleCase, label
from tests.strategies import f32, follow, runs

every_whole_rule = pytest.mark.parametrize("case", WHOLE, ids=label)


def shapes(case: RuleCase) -> Any:
    return case.shapes or [(), (1,), (31,), (5, 3), (3, 40), (2, 3, 17)]


@every_whole_rule
def test_the_record_knows_the_shape_of_every_state(ref: ModuleType, case: RuleCase) -> None:
    rule = ref.rules.RULES[case.stem]
    for shape in shapes(case):
        p = np.random.default_rng(1).standard_normal(shape).astype(f32)
        first, hyper = rule.init(p, **case.hyper), rule.check("test", case.hyper)
        assert {k: x.shape for k, x in first.items()} == rule.shapes(shape, hyper)
        _, second = case.update(ref, p, p, first, 1)
        for name, x in first.items():
            assert (second[name].shape, second[name].dtype) == (x.shape, x.dtype), name
        assert set(first) <= set(case.states)
        assert first.keys() == second.keys()


@every_whole_rule
@given(data=st.data())
def test_update_mutates_none_of_its_inputs(ref: ModuleType, case: RuleCase, data: Any) -> None:
    p, grads = data.draw(runs(steps=2, shapes=shapes(case)))
    state = ref.rules.RULES[case.stem].init(p, **case.hyper)
    for t, g in enumerate(grads, 1):
        before = p.copy(), g.copy(), {k: x.copy() for k, x in state.items()}
        with np.errstate(all="ignore"):
            new_p, new = case.update(ref, p, g, state, t)
        same_bits(p, before[0], "p")
        same_bits(g, before[1], "g")
        same_state(state, before[2])
        assert new_p.dtype == f32 and new_p.shape == p.shape
        p, state = new_p, new


@every_whole_rule
@given(data=st.data())
def test_flipping_every_sign_flips_the_result(ref: ModuleType, case: RuleCase, data: Any) -> None:
    p, grads = data.draw(runs(shapes=shapes(case)))
    exact = ref.rules.RULES[case.stem].tier != "T2"
    if not exact:  # a decomposition may tell equal directions apart by the sign of its rounding errors
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
        grads = [rng.standard_normal(p.shape).astype(f32) for _ in grads]
    one, _ = follow(case.optimizer(ref), [p], [[g] for g in grads])
    other, _ = follow(case.optimizer(ref), [-p], [[-g] for g in grads])
    if exact:
        same_bits(unsigned_zero(-other[0]), unsigned_zero(one[0]), "p")
    else:
        np.testing.assert_allclose(-other[0], one[0], rtol=1e-4, atol=1e-4 * case.hyper["lr"])


@every_whole_rule
def test_second_moments_are_never_negative(ref: ModuleType, case: RuleCase) -> None:
    rng = np.random.default_rng(1)
    for shape in shapes(case):
        p = rng.standard_normal(shape).astype(f32)
        _, state = follow(case.optimizer(ref), [p], [[rng.standard_normal(shape).astype(f32)] for _ in range(8)])
        for s in ref.rules.RULES[case.stem].states:
            assert not s.nonnegative or s.name not in state[0] or state[0][s.name].min() >= 0


@every_whole_rule
def test_an_optimizer_and_the_bare_rule_take_the_same_steps(ref: ModuleType, case: RuleCase) -> None:
    rng, rule = np.random.default_rng(2), ref.rules.RULES[case.stem]
    for shape in shapes(case):
        p = q = rng.standard_normal(shape).astype(f32)
        opt = case.optimizer(ref)
        kept, state = opt.init([p]), rule.init(p, **case.hyper)
        for t in range(1, 6):
            g = rng.standard_normal(shape).astype(f32)
            q, state = case.update(ref, q, g, state, t, **({"tensor": 0} if rule.random else {}))
            (p,), kept = opt.step([p], [g], kept)
            same_bits(p, q, f"p at t={t}")
            same_state(kept[0], {"t": t} | state)


@every_whole_rule
def test_stored_reads_of_float32_states_change_no_bit(ref: ModuleType, case: RuleCase) -> None:
    """Every state has a line of its own name, which a codec may stand behind."""
    rng = np.random.default_rng(3)
    for shape in shapes(case):
        p = rng.standard_normal(shape).astype(f32)
        grads = [[rng.standard_normal(shape).astype(f32)] for _ in range(4)]
        one, state = follow(case.optimizer(ref), [p], grads)
        other, stored = follow(case.optimizer(ref, reads="stored"), [p], grads)
        same_bits(other[0], one[0], "p")
        same_state(stored[0], state[0])


@every_whole_rule
def test_codecs_leave_the_first_step_alone(ref: ModuleType, case: RuleCase) -> None:
    """Zero states decode to zero, and the weights move by what was computed, not by what is kept."""
    rng = np.random.default_rng(4)
    for shape in shapes(case):
        p, g = (rng.standard_normal(shape).astype(f32) for _ in range(2))
        one, _ = follow(case.optimizer(ref), [p], [[g]])
        other, _ = follow(case.optimizer(ref, "dynamic8"), [p], [[g]])
        same_bits(other[0], one[0], "p")


@every_whole_rule
def test_an_empty_tensor_stays_as_it_is(ref: ModuleType, case: RuleCase) -> None:
    rule = ref.rules.RULES[case.stem]
    if case.shapes and rule.fits is not None:
        pytest.skip("the rule takes no empty tensor")
    for shape in [(0,), (3, 0), (0, 3)]:
        p = np.zeros(shape, f32)
        moved, state = follow(case.optimizer(ref), [p], [[p], [p]])
        bare, same = case.update(ref, p, p, rule.init(p, **case.hyper), 1)
        assert moved[0].shape == bare.shape == shape and state[0]["t"] == 2
        empty = [k for k, x in same.items() if x.size == 0]
        same_state({k: state[0][k] for k in empty}, {k: same[k] for k in empty})


@every_whole_rule
def test_the_trace_shows_the_steps_bits(ref: ModuleType, case: RuleCase) -> None:
    """The last p, and every state as it is stored, of a second step; and every line of the rule that was run."""
    rng = np.random.default_rng(5)
    for shape in shapes(case):
        p, g = (rng.standard_normal(shape).astype(f32) for _ in range(2))
        opt = case.optimizer(ref, "dynamic8")
        ps, state = opt.step([p], [g], opt.init([p]))
        after, new = opt.step(ps, [g], state)
        shown = {line.name: line for line in ref.trace(opt, ps, [g], state)}
        same_bits(shown["p"].value, after[0], "p")
        for role, stored in new[0].items():
            if role != "t":
                arrays = getattr(stored, "arrays", None)
                for name, x in ({f"{role}.{k}": a for k, a in arrays.items()} if arrays else {role: stored}).items():
                    same_bits(np.asarray(shown[name].value).reshape(-1), x.reshape(-1), name)
