"""RMSprop: bounded by lr / sqrt(1 - alpha), a variance that is never negative, one momentum of normalised gradients."""

from __future__ import annotations

from math import sqrt
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.strategies import f32, follow, runs


@given(run=runs(steps=5), alpha=st.sampled_from([0.5, 0.9, 0.99]))
def test_no_weight_moves_further_than_the_bound(ref: ModuleType, run: Any, alpha: float) -> None:
    """v >= (1 - alpha) g^2, so |g| / sqrt(v) <= 1 / sqrt(1 - alpha)."""
    zero, grads = np.zeros_like(run[0]), run[1]
    state = ref.rules.rmsprop.init(zero)
    for t, g in enumerate(grads, 1):
        p, state = ref.rules.rmsprop.update(zero, g, state, t=t, lr=1.0, alpha=alpha)
        assert (np.abs(p) <= (1 + 1e-5) / sqrt(1 - alpha)).all()


def test_the_first_step_is_not_corrected(ref: ModuleType) -> None:
    g = f32([1e-3, -2.0, 1e6])
    p, _ = ref.rules.rmsprop.update(np.zeros(3, f32), g, ref.rules.rmsprop.init(g), t=1, lr=0.01, alpha=0.99, eps=1e-12)
    np.testing.assert_allclose(p, [-0.1, 0.1, -0.1], rtol=2e-5)


@pytest.mark.parametrize(("eps_at", "share"), [("outside", 1 / 2), ("inside", 1 / sqrt(2))])
def test_eps_stands_where_it_is_asked_to(ref: ModuleType, eps_at: str, share: float) -> None:
    """With alpha = 0, so that sqrt(v) = |g|: eps = |g| outside the root halves the step, eps = g^2 inside divides by
    sqrt(2)."""
    g = f32([1e-3])
    eps = 1e-3 if eps_at == "outside" else 1e-6
    moved, _ = follow(ref.Optimizer("rmsprop", lr=1.0, alpha=0.0, eps=eps, eps_at=eps_at), f32([0]), [g])
    np.testing.assert_allclose(moved, [-share], rtol=1e-5)


@given(run=runs(low=-3, high=3))
def test_decay_reaches_the_square_and_the_step(ref: ModuleType, run: Any) -> None:
    """As if g + wd p were the gradient. (A kernel of bitsandbytes steps by the raw g.)"""
    p, grads = run
    one, state = follow(ref.Optimizer("rmsprop", wd=0.3), [p], [[grads[0]]])
    other, same = follow(ref.Optimizer("rmsprop"), [p], [[grads[0] + f32(0.3) * p]])
    same_bits(one[0], other[0], "p")
    same_bits(state[0]["v"], same[0]["v"], "v")


def test_decay_alone_moves_weights(ref: ModuleType) -> None:
    moved, _ = follow(ref.Optimizer("rmsprop", lr=0.1, alpha=0.75, wd=0.5), f32([1, -4]), [np.zeros(2, f32)])
    np.testing.assert_allclose(moved, [0.8, -3.8], rtol=1e-6)


@pytest.mark.parametrize(("g", "alpha"), [(-7.7, 0.5), (3.1, 0.5), (0.1, 0.99), (12.3, 0.99)])
def test_a_variance_that_rounds_below_zero_is_zero(ref: ModuleType, g: float, alpha: float) -> None:
    """A constant gradient: v - a^2 tends to 0, and float32 takes it below."""
    zero, grad, below = np.zeros(1, f32), f32([g]), 0
    state = ref.rules.rmsprop.init(zero, centered=True)
    for t in range(1, 1500):
        p, state = ref.rules.rmsprop.update(zero, grad, state, t=t, lr=1.0, alpha=alpha, eps=1e-3, centered=True)
        variance = state["v"] - state["a"] * state["a"]
        below += int(variance[0] < 0)
        assert np.isfinite(p).all()
        if variance[0] <= 0:
            np.testing.assert_allclose(p, -grad / f32(1e-3), rtol=1e-6)
    assert below, "this gradient never showed the trap"


def test_the_divisor_is_the_variance_of_the_gradient(ref: ModuleType) -> None:
    """Against weights alpha^(t-i) in float64."""
    rng = np.random.default_rng(4)
    grads, alpha = (rng.standard_normal((30, 50)) + 1).astype(f32), 0.8
    w = (1 - alpha) * alpha ** np.arange(29, -1, -1)[:, None]
    wide = grads.astype(np.float64)
    variance = (w * wide**2).sum(0) - (w * wide).sum(0) ** 2
    zero = np.zeros(50, f32)
    state = ref.rules.rmsprop.init(zero, centered=True)
    for t, g in enumerate(grads, 1):
        p, state = ref.rules.rmsprop.update(zero, g, state, t=t, lr=1.0, alpha=alpha, centered=True)
    np.testing.assert_allclose(p, -wide[-1] / np.sqrt(variance), rtol=2e-5)


def test_momentum_adds_normalised_gradients_and_lr_stays_outside(ref: ModuleType) -> None:
    """alpha = 0 makes every normalised gradient a sign: buf is 1, then 1.5, then 1.75 - 1."""
    grads = [f32([3.0]), f32([1e-2]), f32([-40.0])]
    state, bufs, moves = ref.rules.rmsprop.init(f32([0]), momentum=0.5), [], []
    for t, (g, lr) in enumerate(zip(grads, (1.0, 1.0, 10.0), strict=True), 1):
        p, state = ref.rules.rmsprop.update(f32([0]), g, state, t=t, lr=lr, alpha=0.0, momentum=0.5)
        bufs.append(float(state["buf"][0]))
        moves.append(float(p[0]))
    assert bufs == pytest.approx([1, 1.5, -0.25], rel=1e-5)
    assert moves == pytest.approx([-1, -1.5, 2.5], rel=1e-5)


def test_a_state_of_nan_stays_nan(ref: ModuleType) -> None:
    """The guard against a negative variance must not swallow it."""
    bad = {"v": f32([np.nan]), "a": f32([1.0])}
    p, state = ref.rules.rmsprop.update(f32([1.0]), f32([1.0]), bad, t=2, centered=True)
    assert np.isnan(p).all() and np.isnan(state["v"]).all()


@pytest.mark.parametrize(("hyper", "bytes_each"), [({}, 4), ({"centered": True}, 8), ({"momentum": 0.9}, 8)])
def test_the_bytes_are_four_for_each_state(ref: ModuleType, hyper: dict[str, Any], bytes_each: int) -> None:
    state = ref.rules.rmsprop.init(np.zeros((3, 5), f32), **hyper)
    assert sum(x.nbytes for x in state.values()) == 15 * bytes_each


@pytest.mark.parametrize(
    "bad", [{"alpha": 1.0}, {"alpha": -0.1}, {"eps": -1e-8}, {"momentum": -0.5}, {"eps_at": "around"}, {"wd": -1}]
)
def test_what_has_no_meaning_is_refused_by_name(ref: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"rmsprop.*{next(iter(bad))} must be"):
        ref.Optimizer("rmsprop", **bad)
