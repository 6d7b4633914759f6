"""Adagrad: a sum of squares that never shrinks, steps of lr / sqrt(t) at most."""

from __future__ import annotations

from math import sqrt
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from tests.bits import same_bits
from tests.strategies import f32, follow, runs


def steps(ref: ModuleType, grads: Any, **hyper: Any) -> tuple[np.ndarray, list[Any]]:
    """The move of every step, weights put back to 0, and s after each."""
    zero, moves, sums = np.zeros_like(grads[0]), [], []
    state = ref.rules.adagrad.init(zero, **hyper)
    for t, g in enumerate(grads, 1):
        p, state = ref.rules.adagrad.update(zero, g, state, t=t, **hyper)
        moves.append(p)
        sums.append(state["s"])
    return np.array(moves), sums


@given(run=runs(steps=6))
def test_the_sum_never_shrinks(ref: ModuleType, run: Any) -> None:
    _, sums = steps(ref, run[1], init_acc=1e-3)
    for before, after in zip([np.full_like(sums[0], 1e-3), *sums], sums, strict=False):
        assert (after >= before).all()


@given(run=runs(steps=6))
def test_no_weight_moves_further_than_lr(ref: ModuleType, run: Any) -> None:
    moves, _ = steps(ref, run[1], lr=1.0)
    assert (np.abs(moves) <= 1 + 1e-6).all()


def test_a_constant_gradient_steps_by_one_over_the_root_of_t(ref: ModuleType) -> None:
    moves, _ = steps(ref, [f32([0.3, -70.0])] * 40, lr=1.0)
    want = 1 / np.sqrt(np.arange(1, 41))[:, None] * [-1, 1]
    np.testing.assert_allclose(moves, want, rtol=1e-5)


def test_the_divisor_is_the_root_of_the_sum(ref: ModuleType) -> None:
    grads = np.random.default_rng(8).standard_normal((30, 50)).astype(f32)
    moves, _ = steps(ref, grads, lr=0.5, init_acc=0.7)
    wide = grads.astype(np.float64)
    np.testing.assert_allclose(moves, -0.5 * wide / np.sqrt(0.7 + np.cumsum(wide**2, 0)), rtol=3e-6)


def test_the_rate_decays_from_the_second_step_on(ref: ModuleType) -> None:
    """t = 1 has the whole rate: divided by 1 + (t - 1) lr_decay, not by 1 + t lr_decay."""
    moves, _ = steps(ref, [f32([2.0])] * 11, lr=1.0, lr_decay=0.1)
    np.testing.assert_allclose(moves[[0, 1, 10], 0], [-1, -1 / sqrt(2) / 1.1, -1 / sqrt(11) / 2], rtol=1e-6)


@pytest.mark.parametrize(("eps_at", "eps", "share"), [("outside", 1e-3, 1 / 2), ("inside", 1e-6, 1 / sqrt(2))])
def test_eps_stands_where_it_is_asked_to(ref: ModuleType, eps_at: str, eps: float, share: float) -> None:
    """eps = |g| outside the root halves the first step, eps = g^2 inside divides it by sqrt(2)."""
    moves, _ = steps(ref, [f32([1e-3])], lr=1.0, eps=eps, eps_at=eps_at)
    np.testing.assert_allclose(moves[0], [-share], rtol=1e-5)


@given(run=runs(low=-3, high=3))
def test_decay_is_part_of_the_gradient(ref: ModuleType, run: Any) -> None:
    p, grads = run
    one, state = follow(ref.Optimizer("adagrad", wd=0.3), [p], [[grads[0]]])
    other, same = follow(ref.Optimizer("adagrad"), [p], [[grads[0] + f32(0.3) * p]])
    same_bits(one[0], other[0], "p")
    same_bits(state[0]["s"], same[0]["s"], "s")


def test_decay_alone_moves_weights_by_lr(ref: ModuleType) -> None:
    moved, _ = follow(ref.Optimizer("adagrad", lr=0.1, wd=0.5), f32([1.0, -4.0]), [np.zeros(2, f32)])
    np.testing.assert_allclose(moved, [0.9, -3.9], rtol=1e-6)


def test_a_large_sum_no_longer_grows(ref: ModuleType) -> None:
    """2^24 + 1 is 2^24 in float32: s stands still, the step does not."""
    state = {"s": f32([2.0**24, 2.0**24])}
    p, new = ref.rules.adagrad.update(f32([0.0, 0.0]), f32([1.0, 1.5]), state, t=9, lr=1.0)
    assert new["s"].tolist() == [2.0**24, 2.0**24 + 2]
    np.testing.assert_allclose(p, [-(2.0**-12), -1.5 * 2.0**-12], rtol=1e-6)


@pytest.mark.parametrize(
    "bad", [{"init_acc": -0.1}, {"lr_decay": -1e-3}, {"eps": -1e-9}, {"eps_at": "none"}, {"wd": -1}]
)
def test_what_has_no_meaning_is_refused_by_name(ref: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"adagrad.*{next(iter(bad))} must be"):
        ref.Optimizer("adagrad", **bad)
