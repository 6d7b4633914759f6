"""AdamW: bounded by B_t and no less, bias-corrected, eps outside the root."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.rules import adaptive
from tests.strategies import f32, follow, runs

betas = pytest.mark.parametrize(("beta1", "beta2"), adaptive.BETAS)


@betas
def test_the_adversary_reaches_the_bound(ref: ModuleType, beta1: float, beta2: float) -> None:
    adaptive.check_the_adversary_reaches_the_bound(ref, "adamw", beta1, beta2)


@betas
@given(seed=st.integers(0, 2**32 - 1))
def test_no_update_passes_the_bound(ref: ModuleType, beta1: float, beta2: float, seed: int) -> None:
    adaptive.check_nothing_passes_the_bound(ref, "adamw", beta1, beta2, seed)


def test_the_first_step_is_lr_along_the_sign(ref: ModuleType) -> None:
    adaptive.check_the_first_step_is_lr_along_the_sign(ref, "adamw")


def test_eps_stands_outside_the_root_after_the_correction(ref: ModuleType) -> None:
    adaptive.check_eps_stands_outside_the_root_after_the_correction(ref, "adamw")


def test_without_memory_it_is_sign_descent(ref: ModuleType) -> None:
    adaptive.check_no_memory_is_sign_descent(ref, "adamw")


@given(run=runs(), beta1=st.sampled_from([0.0, 0.7]))
def test_without_decay_it_is_adam(ref: ModuleType, run: Any, beta1: float) -> None:
    p, grads = run
    hyper: dict[str, Any] = {"lr": 0.02, "beta1": beta1, "beta2": 0.96, "wd": 0.0}
    one, _ = follow(ref.Optimizer("adamw", **hyper), p, grads)
    other, _ = follow(ref.Optimizer("adam", **hyper), p, grads)
    same_bits(one, other, "p")


def test_decay_shrinks_the_weight_and_stays_out_of_the_moments(ref: ModuleType) -> None:
    moved, state = follow(ref.Optimizer("adamw", lr=0.1, wd=0.5), [f32([1.0, 4.0])], [[np.zeros(2, f32)]])
    same_bits(moved[0], f32([1.0, 4.0]) * f32(0.95), "p")
    assert not state[0]["m"].any() and not state[0]["v"].any()


def test_decay_comes_before_the_update(ref: ModuleType) -> None:
    """From p = 0 the first step is -lr exactly as without decay: what has just been added is not decayed."""
    g = f32([3.0])
    moved, _ = follow(ref.Optimizer("adamw", lr=0.5, wd=1.0), np.zeros(1, f32), [g])
    np.testing.assert_allclose(moved, [-0.5], rtol=1e-6)
