"""Signum: every weight moves by lr along the sign of one running mean; Lion with equal betas."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.strategies import assignments, f32, follow, records, runs

ORDERS = ["before", "after", "additive"]


def sign(x: Any) -> Any:
    return np.where(x > 0, f32(1), np.where(x < 0, f32(-1), f32(0)))


@given(run=runs(), beta=st.sampled_from([0.5, 0.9, 0.99]), data=st.data())
def test_it_is_lion_with_equal_betas(ref: ModuleType, run: Any, beta: float, data: Any) -> None:
    """Bit for bit, through any codec."""
    p, grads = run
    codecs = records(ref, data.draw(assignments(("m",))))
    one, state = follow(ref.Optimizer("signum", codecs, lr=0.01, beta=beta, wd=0.3), [p], [[g] for g in grads])
    lion = ref.Optimizer("lion", codecs, lr=0.01, betas=(beta, beta), wd=0.3)
    other, same = follow(lion, [p], [[g] for g in grads])
    same_bits(one[0], other[0], "p")
    for mine, theirs in zip(
        *(getattr(x, "arrays", {"m": x}).values() for x in (state[0]["m"], same[0]["m"])), strict=True
    ):
        same_bits(mine, theirs, "m")


@given(run=runs())
def test_every_weight_moves_by_lr_or_not_at_all(ref: ModuleType, run: Any) -> None:
    zero, grads = np.zeros_like(run[0]), run[1]
    state = ref.rules.signum.init(zero)
    for t, g in enumerate(grads, 1):
        p, state = ref.rules.signum.update(zero, g, state, t=t, lr=0.003)
        same_bits(p, f32(0) - f32(0.003) * sign(state["m"]), "p")


@given(run=runs())
def test_without_memory_it_is_sign_descent_and_keeps_nothing(ref: ModuleType, run: Any) -> None:
    p, grads = run
    moved, state = follow(ref.Optimizer("signum", lr=0.01, beta=0.0, wd=0.3), [p], [[g] for g in grads])
    for g in grads:
        p = p * f32(1 - 0.01 * 0.3) - f32(0.01) * sign(g)
    same_bits(moved[0], p, "p")
    assert state == [{"t": 3}]


def test_the_momentum_is_a_mean_and_not_a_sign(ref: ModuleType) -> None:
    """One gradient of 100 outweighs nine of -1: a mean of signs would have turned at once."""
    opt, p = ref.Optimizer("signum", lr=1.0, beta=0.9), f32([0.0])
    p, state = follow(opt, [p], [[f32([100.0])]] + [[f32([-1.0])]] * 9)
    assert p[0][0] == -10.0
    np.testing.assert_allclose(state[0]["m"], [10 * 0.9**9 - (1 - 0.9**9)], rtol=1e-5)


def test_the_step_takes_the_new_momentum(ref: ModuleType) -> None:
    p, _ = ref.rules.signum.update(f32([0.0]), f32([-20.0]), {"m": f32([1.0])}, t=5, lr=0.5, beta=0.9)
    assert p[0] == 0.5


def test_the_orders_of_decay_differ_by_the_square_of_lr(ref: ModuleType) -> None:
    """p = 4, lr = 1/2, wd = 1/4, m > 0: 4 (7/8) - 1/2, (4 - 1/2) 7/8, 4 - (1 + 4/4) / 2."""
    got = [ref.Optimizer("signum", lr=0.5, wd=0.25, decay_order=order) for order in ORDERS]
    assert [float(follow(opt, f32([4.0]), [f32([1.0])])[0][0]) for opt in got] == [3.0, 3.0625, 3.0]
    down = [float(follow(opt, f32([4.0]), [f32([-1.0])])[0][0]) for opt in got]
    assert down == [4.0, 3.9375, 4.0]


@pytest.mark.parametrize("order", ORDERS)
def test_decay_never_reaches_the_momentum(ref: ModuleType, order: str) -> None:
    opt = ref.Optimizer("signum", lr=0.1, wd=0.5, decay_order=order)
    moved, state = follow(opt, [f32([4.0])], [[np.zeros(1, f32)]])
    np.testing.assert_allclose(moved[0], [3.8], rtol=1e-6)
    assert not state[0]["m"].any()


def test_a_nan_gradient_has_no_sign_and_moves_nothing(ref: ModuleType) -> None:
    p, state = ref.rules.signum.update(f32([1.0, 1.0]), f32([np.nan, 1.0]), {"m": f32([0.5, 0.5])}, t=2, lr=0.5)
    assert p.tolist() == [1.0, 0.5]
    assert np.isnan(state["m"][0])


@pytest.mark.parametrize("bad", [{"beta": 1.0}, {"beta": -0.1}, {"lr": -1}, {"decay_order": "never"}])
def test_what_has_no_meaning_is_refused_by_name(ref: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"signum.*{next(iter(bad))} must be"):
        ref.Optimizer("signum", **bad)
