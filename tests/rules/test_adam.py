"""Adam: bounded by B_t and no less, bias-corrected, eps outside the root."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state, unsigned_zero
from tests.rules import adaptive
from tests.strategies import f32, follow, runs

betas = pytest.mark.parametrize(("beta1", "beta2"), adaptive.BETAS)


@betas
def test_the_adversary_reaches_the_bound(ref: ModuleType, beta1: float, beta2: float) -> None:
    adaptive.check_the_adversary_reaches_the_bound(ref, "adam", beta1, beta2)


@betas
@given(seed=st.integers(0, 2**32 - 1))
def test_no_update_passes_the_bound(ref: ModuleType, beta1: float, beta2: float, seed: int) -> None:
    adaptive.check_nothing_passes_the_bound(ref, "adam", beta1, beta2, seed)


def test_the_first_step_is_lr_along_the_sign(ref: ModuleType) -> None:
    adaptive.check_the_first_step_is_lr_along_the_sign(ref, "adam")


def test_eps_stands_outside_the_root_after_the_correction(ref: ModuleType) -> None:
    adaptive.check_eps_stands_outside_the_root_after_the_correction(ref, "adam")


def test_without_memory_it_is_sign_descent(ref: ModuleType) -> None:
    adaptive.check_no_memory_is_sign_descent(ref, "adam")


def test_decay_is_part_of_the_gradient(ref: ModuleType) -> None:
    """With wd alone to go by, Adam walks at full speed: the decay is divided by its own size."""
    p, _ = follow(ref.Optimizer("adam", lr=0.1, wd=0.5), f32([1.0, 4.0]), [np.zeros(2, f32)])
    np.testing.assert_allclose(p, [0.9, 3.9], rtol=1e-6)


@given(run=runs())
def test_decay_goes_into_both_moments(ref: ModuleType, run: Any) -> None:
    p, grads = run
    _, state = follow(ref.Optimizer("adam", wd=0.06), [p], [[grads[0]]])
    _, same = follow(ref.Optimizer("adam"), [p], [[grads[0] + f32(0.06) * p]])
    same_bits(state[0]["m"], same[0]["m"], "m")
    same_bits(state[0]["v"], same[0]["v"], "v")


def test_amsgrad_divides_by_the_largest_second_moment(ref: ModuleType) -> None:
    adaptive.check_amsgrad_divides_by_the_largest_second_moment(ref, "adam")


def test_amsgrad_keeps_a_nan(ref: ModuleType) -> None:
    adaptive.check_amsgrad_keeps_a_nan(ref, "adam")


@pytest.mark.parametrize("eps_at", ["outside", "uncorrected", "inside"])
def test_each_place_of_eps_is_its_own(ref: ModuleType, eps_at: str) -> None:
    adaptive.check_each_place_of_eps_is_its_own(ref, "adam", eps_at)


def test_the_correction_can_be_left_out(ref: ModuleType) -> None:
    adaptive.check_the_correction_can_be_left_out(ref, "adam")


def test_dialects_are_named(ref: ModuleType) -> None:
    adaptive.check_dialects_are_named(ref, "adam")


@given(run=runs(), amsgrad=st.booleans(), eps_at=st.sampled_from(["outside", "uncorrected", "inside"]))
def test_with_decoupled_decay_it_is_adamw(ref: ModuleType, run: Any, amsgrad: bool, eps_at: str) -> None:
    p, grads = run
    words = {"lr": 0.02, "betas": (0.7, 0.96), "wd": 0.3, "amsgrad": amsgrad, "eps_at": eps_at}
    one, state = follow(ref.Optimizer("adam", decay="decoupled", **words), [p], [[g] for g in grads])
    other, same = follow(ref.Optimizer("adamw", **words), [p], [[g] for g in grads])
    same_bits(one[0], other[0], "p")
    same_state(state[0], same[0])


@given(run=runs(), beta2=st.sampled_from([0.9, 0.99]))
def test_without_first_moment_and_correction_it_is_rmsprop(ref: ModuleType, run: Any, beta2: float) -> None:
    p, grads = run
    words = {"lr": 0.02, "eps": 1e-6, "wd": 0.3}
    adam = ref.Optimizer("adam", betas=(0.0, beta2), bias_correction=False, **words)
    one, state = follow(adam, [p], [[g] for g in grads])
    other, same = follow(ref.Optimizer("rmsprop", alpha=beta2, **words), [p], [[g] for g in grads])
    same_bits(unsigned_zero(one[0]), unsigned_zero(other[0]), "p")
    same_bits(state[0]["v"], same[0]["v"], "v")
