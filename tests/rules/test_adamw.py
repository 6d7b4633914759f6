"""AdamW: bounded by B_t and no less, bias-corrected, eps outside the root."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state
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


def test_amsgrad_divides_by_the_largest_second_moment(ref: ModuleType) -> None:
    adaptive.check_amsgrad_divides_by_the_largest_second_moment(ref, "adamw")


def test_amsgrad_keeps_a_nan(ref: ModuleType) -> None:
    adaptive.check_amsgrad_keeps_a_nan(ref, "adamw")


@pytest.mark.parametrize("eps_at", ["outside", "uncorrected", "inside"])
def test_each_place_of_eps_is_its_own(ref: ModuleType, eps_at: str) -> None:
    adaptive.check_each_place_of_eps_is_its_own(ref, "adamw", eps_at)


def test_the_correction_can_be_left_out(ref: ModuleType) -> None:
    adaptive.check_the_correction_can_be_left_out(ref, "adamw")


def test_dialects_are_named(ref: ModuleType) -> None:
    adaptive.check_dialects_are_named(ref, "adamw")


@pytest.mark.parametrize(("order", "want"), [("before", 3.0), ("after", 3.0625), ("additive", 3.0)])
def test_the_orders_of_decay_differ_by_the_square_of_lr(ref: ModuleType, order: str, want: float) -> None:
    """p = 4, lr = 1/2, wd = 1/4, a first step of lr: 4 (7/8) - 1/2, (4 - 1/2) 7/8, 4 - (1 + 4/4) / 2."""
    opt = ref.Optimizer("adamw", lr=0.5, wd=0.25, eps=0.0, decay_order=order)
    np.testing.assert_allclose(follow(opt, f32([4.0]), [f32([3.0])])[0], [want], rtol=1e-6)


@pytest.mark.parametrize("order", ["after", "additive"])
@given(run=runs(low=-6), eps_at=st.sampled_from(["outside", "uncorrected", "inside"]))
def test_decay_in_any_order_stays_out_of_the_moments(ref: ModuleType, run: Any, order: str, eps_at: str) -> None:
    p, grads = run
    words = {"lr": 0.01, "eps_at": eps_at}
    one, state = follow(ref.Optimizer("adamw", wd=0.1, decay_order=order, **words), [p], [[g] for g in grads])
    other, same = follow(ref.Optimizer("adamw", wd=0.1, **words), [p], [[g] for g in grads])
    same_state(state[0], same[0])
    np.testing.assert_allclose(one[0], other[0], atol=1e-3 * 0.01 * 4 + 1e-5 * np.abs(p).max(initial=0), rtol=0)


@given(run=runs(shapes=[(31,), (5, 3)]))
def test_lamb_with_a_ratio_of_one_is_its_additive_order(ref: ModuleType, run: Any) -> None:
    p, grads = run
    words = {"lr": 0.02, "betas": (0.7, 0.96), "eps": 1e-6, "wd": 0.0}
    one, state = follow(ref.Optimizer("adamw", decay_order="additive", **words), [p], [[g] for g in grads])
    other, same = follow(ref.Optimizer("lamb", variant="apex", **words), [p], [[g] for g in grads])
    same_bits(one[0], other[0], "p")
    same_state(state[0], same[0])


def test_states_in_the_dtype_of_bfloat16_weights_are_a_codec_and_stall(ref: ModuleType) -> None:
    """torch makes states like p: 4 bytes a parameter. With beta2 = 0.999 v moves by 2^-10 of itself at most, less than
    half a step of bfloat16, and stays where it is."""
    kept = {}
    for name in ("f32", "bf16"):
        opt, p = ref.Optimizer("adamw", {"p": "bf16", "m": name, "v": name}, lr=1e-3), [np.ones(8, f32)]
        state = opt.init(p)
        for g in [np.ones(8, f32)] * 20 + [np.full(8, 0.1, f32)] * 2000:
            p, state = opt.step(p, [g], state)
        kept[name] = state[0]["v"].decode() if name == "bf16" else state[0]["v"]
        assert sum(x.nbytes for x in ((state[0][s].codes if name == "bf16" else state[0][s]) for s in "mv")) == {
            "f32": 64, "bf16": 32}[name]  # fmt: skip
    true = 1e-2 + (1 - 0.999**20 - 1e-2) * 0.999**2000
    np.testing.assert_allclose(kept["f32"], true, rtol=2e-2)
    assert (kept["bf16"] > 0.015).all()
