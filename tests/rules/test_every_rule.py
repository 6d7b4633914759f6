"""Laws that every rule obeys: symmetry, scale, fixed points, no mutation, elementwise scope."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state, unsigned_zero
from tests.cases import RULES, RuleCase, label
from tests.strategies import FULL, assignments, f32, follow, records, runs

every_rule = pytest.mark.parametrize("case", RULES, ids=label)
LINEAR = {
    "sgd",
}
"""Rules whose step is as long as the gradient; the others do not mind its unit."""
COUPLED = ("adam", "rmsprop", "adagrad")
SYMMETRIC = ("f32", "bf16", "int8_linear")


@every_rule
def test_the_record_names_the_states_that_are_kept(ref: ModuleType, case: RuleCase) -> None:
    rule = ref.rules.RULES[case.stem]
    state = rule.init(np.ones((2, 3), f32), **case.hyper)
    assert tuple(state) == case.states == tuple(s.name for s in rule.states_for(**case.hyper))
    for x in state.values():
        same_bits(x, np.full((2, 3), case.hyper.get("init_acc", 0), f32), "initial state")


@every_rule
@given(run=runs(steps=2))
def test_update_mutates_none_of_its_inputs(ref: ModuleType, case: RuleCase, run: Any) -> None:
    p, grads = run
    state = ref.rules.RULES[case.stem].init(p, **case.hyper)
    for t, g in enumerate(grads, 1):
        before = p.copy(), g.copy(), {k: x.copy() for k, x in state.items()}
        new_p, new = case.update(ref, p, g, state, t)
        same_bits(p, before[0], "p")
        same_bits(g, before[1], "g")
        assert state.keys() == before[2].keys()
        for k, x in before[2].items():
            same_bits(state[k], x, k)
        assert new_p.dtype == f32 and all(x.dtype == f32 and x.shape == p.shape for x in new.values())
        p, state = new_p, new


@every_rule
@given(run=runs(), data=st.data())
def test_flipping_every_sign_flips_the_result(ref: ModuleType, case: RuleCase, run: Any, data: Any) -> None:
    p, grads = run
    opt = case.optimizer(ref, records(ref, data.draw(assignments(case.states, SYMMETRIC))))
    one, _ = follow(opt, p, grads)
    other, _ = follow(opt, -p, [-g for g in grads])
    same_bits(unsigned_zero(-other), unsigned_zero(one), "p")


@pytest.mark.parametrize("case", [c for c in RULES if c.stem not in LINEAR], ids=label)
@given(run=runs(low=-6), k=st.integers(-6, 6), data=st.data())
def test_the_gradients_unit_does_not_matter(ref: ModuleType, case: RuleCase, run: Any, k: int, data: Any) -> None:
    """Gradients times 2^k, eps times 2^k: the same weights, bit for bit, through every codec."""
    p, grads = run
    codecs = records(ref, data.draw(assignments(case.states)))
    hyper = {"wd": 0.0} if case.stem in COUPLED else {}
    power = 2 * k if case.hyper.get("eps_at") == "inside" else k
    scaled = hyper | ({"eps": case.hyper["eps"] * 2.0**power} if "eps" in case.hyper else {})
    scaled |= {"init_acc": case.hyper["init_acc"] * 4.0**k} if "init_acc" in case.hyper else {}
    one, _ = follow(case.optimizer(ref, codecs, **hyper), p, grads)
    other, _ = follow(case.optimizer(ref, codecs, **scaled), p, [g * f32(2.0**k) for g in grads])
    same_bits(other, one, "p")


@pytest.mark.parametrize("case", [c for c in RULES if c.stem == "sgd"], ids=label)
@given(run=runs(low=-6), k=st.integers(-6, 6))
def test_sgd_is_linear_in_the_gradient(ref: ModuleType, case: RuleCase, run: Any, k: int) -> None:
    p, grads = run
    opt = case.optimizer(ref, wd=0.0)
    one, _ = follow(opt, np.zeros_like(p), grads)
    other, _ = follow(opt, np.zeros_like(p), [g * f32(2.0**k) for g in grads])
    same_bits(other, one * f32(2.0**k), "distance")


@every_rule
@given(run=runs(shapes=[(2,), (31,), (129,)]), seed=st.integers(0, 2**32 - 1))
def test_permuting_elements_permutes_the_result(ref: ModuleType, case: RuleCase, run: Any, seed: int) -> None:
    p, grads = run
    order = np.random.default_rng(seed).permutation(p.size)
    one, state = follow(case.optimizer(ref), [p], [[g] for g in grads])
    other, shuffled = follow(case.optimizer(ref), [p[order]], [[g[order]] for g in grads])
    same_bits(other[0], one[0][order], "p")
    for role in case.states:
        same_bits(shuffled[0][role], state[0][role][order], role)


@every_rule
@given(run=runs(shapes=[(64,), (128,)]), cut=st.sampled_from([0, 16, 48]), data=st.data())
def test_splitting_a_tensor_at_a_block_changes_no_bit(
    ref: ModuleType, case: RuleCase, run: Any, cut: int, data: Any
) -> None:
    p, grads = run
    codecs = {
        s: c if c.scope == "element" else c(block=16)
        for s, c in records(ref, data.draw(assignments(case.states))).items()
    }
    opt = case.optimizer(ref, codecs)
    whole, _ = follow(opt, [p], [[g] for g in grads])
    halves, _ = follow(opt, [p[:cut], p[cut:]], [[g[:cut], g[cut:]] for g in grads])
    same_bits(np.concatenate(halves), whole[0], "p")


@every_rule
@given(run=runs(shapes=[(3, 40), (5, 3), (4, 129)]), data=st.data())
def test_splitting_a_matrix_between_rows_changes_no_bit(ref: ModuleType, case: RuleCase, run: Any, data: Any) -> None:
    p, grads = run
    stems = ["f32", "bf16"] if p.shape[-1] < 16 else ["f32", "bf16", "int8_linear", "dynamic8"]
    opt = case.optimizer(ref, records(ref, data.draw(assignments(case.states, stems))))
    whole, _ = follow(opt, [p], [[g] for g in grads])
    parts, _ = follow(opt, [p[:1], p[1:]], [[g[:1], g[1:]] for g in grads])
    same_bits(np.concatenate(parts), whole[0], "p")


@every_rule
@given(run=runs())
def test_a_learning_rate_of_zero_moves_nothing(ref: ModuleType, case: RuleCase, run: Any) -> None:
    p, grads = run
    moved, _ = follow(case.optimizer(ref, lr=0.0), p, grads)
    same_bits(unsigned_zero(moved), unsigned_zero(p), "p")


@every_rule
@given(run=runs(kinds=["all zero"]))
def test_no_gradient_from_zero_states_without_decay_moves_nothing(ref: ModuleType, case: RuleCase, run: Any) -> None:
    p, grads = run
    moved, state = follow(case.optimizer(ref, wd=0.0), [p], [[g] for g in grads])
    same_bits(unsigned_zero(moved[0]), unsigned_zero(p), "p")
    first = ref.rules.RULES[case.stem].init(p, **case.hyper)
    for role in case.states:
        same_bits(unsigned_zero(state[0][role]), first[role], role)


@every_rule
@given(run=runs(steps=2, shapes=FULL), where=st.integers(0, 10**6), bad=st.sampled_from([np.nan, np.inf, -np.inf]))
def test_a_bad_gradient_element_touches_no_other_element(
    ref: ModuleType, case: RuleCase, run: Any, where: int, bad: float
) -> None:
    p, grads = run
    i = where % p.size
    clean = follow(case.optimizer(ref), [p], [[g] for g in grads])[0][0].reshape(-1)
    grads[0].reshape(-1)[i] = bad
    dirty = follow(case.optimizer(ref), [p], [[g] for g in grads])[0][0].reshape(-1)
    same_bits(np.delete(dirty, i), np.delete(clean, i), "the other elements")


@every_rule
def test_second_moments_are_never_negative(ref: ModuleType, case: RuleCase) -> None:
    rng = np.random.default_rng(1)
    p = rng.standard_normal(50).astype(f32)
    _, state = follow(case.optimizer(ref), [p], [[rng.standard_normal(50).astype(f32)] for _ in range(20)])
    for s in ref.rules.RULES[case.stem].states:
        assert (state[0][s.name].min() >= 0) == s.nonnegative if s.name in case.states else True


@every_rule
def test_an_optimizer_and_the_bare_rule_take_the_same_steps(ref: ModuleType, case: RuleCase) -> None:
    rng = np.random.default_rng(2)
    p = rng.standard_normal((3, 5)).astype(f32)
    opt, q = case.optimizer(ref), p
    kept, state = opt.init([p]), ref.rules.RULES[case.stem].init(p, **case.hyper)
    for t in range(1, 6):
        g = rng.standard_normal((3, 5)).astype(f32)
        q, state = case.update(ref, q, g, state, t)
        (p,), kept = opt.step([p], [g], kept)
        same_bits(p, q, f"p at t={t}")
        same_state(kept[0], {"t": t} | state)
