"""Lion: every weight moves by lr, by the sign of one mixture, while another is kept."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.strategies import f32, follow, runs

HYPER = {"lr": 0.003, "beta1": 0.85, "beta2": 0.95}


def sgn(x: Any) -> Any:
    return np.where(x > 0, f32(1), np.where(x < 0, f32(-1), f32(0)))


@given(run=runs())
def test_every_weight_moves_by_lr_or_not_at_all(ref: ModuleType, run: Any) -> None:
    p, grads = run
    rule, zero = ref.rules.lion, np.zeros_like(p)
    state = rule.init(zero)
    for t, g in enumerate(grads, 1):
        c = f32(0.85) * state["m"] + f32(1 - 0.85) * g
        moved, state = rule.update(zero, g, state, t=t, **HYPER)
        same_bits(np.abs(moved), np.where(c == 0, f32(0), f32(0.003)), "|p|")


@given(run=runs(low=-6))
def test_sizes_of_gradients_do_not_matter_while_signs_agree(ref: ModuleType, run: Any) -> None:
    """Any positive factor on all gradients, not only a power of two."""
    p, grads = run
    one, _ = follow(ref.Optimizer("lion", **HYPER), p, grads[:1])
    other, _ = follow(ref.Optimizer("lion", **HYPER), p, [f32(3.7) * grads[0]])
    same_bits(other, one, "p")


@given(run=runs())
def test_with_equal_betas_it_is_signum(ref: ModuleType, run: Any) -> None:
    p, grads = run
    moved, _ = follow(ref.Optimizer("lion", lr=0.01, betas=(0.9, 0.9), wd=0.3), p, grads)
    m = np.zeros_like(p)
    for g in grads:
        m = f32(0.9) * m + f32(1 - 0.9) * g
        p = p * f32(1 - 0.01 * 0.3) - f32(0.01) * sgn(m)
    same_bits(moved, p, "p")


@given(run=runs())
def test_without_beta1_it_is_sign_descent(ref: ModuleType, run: Any) -> None:
    p, grads = run
    moved, _ = follow(ref.Optimizer("lion", lr=0.01, beta1=0.0, beta2=0.9), p, grads)
    for g in grads:
        p = p - f32(0.01) * sgn(g)
    same_bits(moved, p, "p")


def test_the_step_weighs_by_beta1_and_the_state_by_beta2(ref: ModuleType) -> None:
    """m = 1, g = -7: c = .85 - .15 * 7 < 0 steps up; with beta2 (.95 - .05 * 7 > 0) it would step down."""
    p, state = ref.rules.lion.update(f32([0.0]), f32([-7.0]), {"m": f32([1.0])}, t=5, **HYPER)
    assert p[0] == f32(0.003)
    np.testing.assert_allclose(state["m"], [0.95 - 0.35], rtol=1e-6)


def test_the_step_uses_the_momentum_from_before(ref: ModuleType) -> None:
    """m = 1, g = -5.5: c = .85 - .825 > 0; with the new m (.675), .574 - .825 < 0."""
    p, _ = ref.rules.lion.update(f32([0.0]), f32([-5.5]), {"m": f32([1.0])}, t=5, **HYPER)
    assert p[0] == f32(-0.003)


def test_decay_never_reaches_the_momentum(ref: ModuleType) -> None:
    moved, state = follow(ref.Optimizer("lion", lr=0.1, wd=0.5), [f32([4.0])], [[np.zeros(1, f32)]])
    same_bits(moved[0], f32([4.0]) * f32(0.95), "p")
    assert not state[0]["m"].any()


def test_a_nan_gradient_has_no_sign_and_moves_nothing(ref: ModuleType) -> None:
    p, state = ref.rules.lion.update(f32([1.0, 1.0]), f32([np.nan, 1.0]), {"m": f32([0.5, 0.5])}, t=2, **HYPER)
    assert p.tolist() == [1.0, float(f32(1.0) - f32(0.003))]
    assert np.isnan(state["m"][0])


@given(seed=st.integers(0, 2**32 - 1), wd=st.sampled_from([0.5, 2.0]))
def test_with_decay_weights_stay_inside_one_over_wd(ref: ModuleType, seed: int, wd: float) -> None:
    rng = np.random.default_rng(seed)
    p = rng.uniform(-1 / wd, 1 / wd, 20).astype(f32)
    steady = rng.choice([-1, 1], 20).astype(f32)
    p, _ = follow(ref.Optimizer("lion", lr=0.1, wd=wd), p, [steady] * 60)
    assert np.abs(p).max() <= (1 / wd) * (1 + 1e-5)


@pytest.mark.parametrize("order", ["before", "after", "additive"])
@given(run=runs(), beta=st.sampled_from([0.5, 0.9]))
def test_in_every_order_of_decay_equal_betas_make_signum(ref: ModuleType, run: Any, order: str, beta: float) -> None:
    p, grads = run
    words = {"lr": 0.01, "wd": 0.3, "decay_order": order}
    one, state = follow(ref.Optimizer("lion", betas=(beta, beta), **words), [p], [[g] for g in grads])
    other, same = follow(ref.Optimizer("signum", beta=beta, **words), [p], [[g] for g in grads])
    same_bits(one[0], other[0], "p")
    same_bits(state[0]["m"], same[0]["m"], "m")


@pytest.mark.parametrize(
    ("order", "up", "down"), [("before", 3.0, 4.0), ("after", 3.0625, 3.9375), ("additive", 3.0, 4.0)]
)
def test_the_orders_of_decay_differ_by_the_square_of_lr(ref: ModuleType, order: str, up: float, down: float) -> None:
    """p = 4, lr = 1/2, wd = 1/4: 4 (7/8) - 1/2, (4 - 1/2) 7/8, 4 - (1 + 4/4) / 2."""
    opt = ref.Optimizer("lion", lr=0.5, wd=0.25, decay_order=order)
    moves = [float(follow(opt, f32([4.0]), [f32([g])])[0][0]) for g in (1.0, -1.0)]
    assert moves == [up, down]


def test_the_order_of_decay_is_one_of_three(ref: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"lion.*decay_order must be one of 'before', .*, got 'first'"):
        ref.Optimizer("lion", decay_order="first")
