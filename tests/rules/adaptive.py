"""Laws that Adam and AdamW share; each of their test files runs them on its own rule."""

from __future__ import annotations

from math import sqrt
from types import ModuleType

import numpy as np
import pytest

from tests.strategies import f32

BETAS = [(0.9, 0.999), (0.8, 0.97), (0.5, 0.999)]


def largest_update(t: int, beta1: float, beta2: float) -> float:
    """B_t: no sequence of gradients makes |m_hat| / sqrt(v_hat) larger at step t (Cauchy-Schwarz)."""
    rho = beta1**2 / beta2
    return sqrt(1 - beta2**t) / (1 - beta1**t) * (1 - beta1) / sqrt(1 - beta2) * sqrt((1 - rho**t) / (1 - rho))


def updates(ref: ModuleType, stem: str, grads: np.ndarray, beta1: float, beta2: float) -> np.ndarray:
    """|update| / lr of every step over the rows of `grads`: lr 1, no eps, no decay, weights put back to 0."""
    rule, out = ref.rules.RULES[stem], []
    zero = np.zeros(grads.shape[1:], f32)
    state = rule.init(zero)
    for t, g in enumerate(grads.astype(f32), 1):
        p, state = rule.update(zero, g, state, t=t, lr=1.0, beta1=beta1, beta2=beta2, eps=0.0, wd=0.0)
        out.append(np.abs(p))
    return np.array(out)


def check_the_adversary_reaches_the_bound(ref: ModuleType, stem: str, beta1: float, beta2: float) -> None:
    """g_i proportional to (beta1 / beta2)^(t - i) attains B_t."""
    for t in (1, 2, 7, 40):
        grads = ((beta1 / beta2) ** np.arange(t - 1, -1, -1.0))[:, None]
        got, bound = float(updates(ref, stem, grads, beta1, beta2)[-1, 0]), largest_update(t, beta1, beta2)
        assert abs(got - bound) < 2e-5 * bound, f"t={t}: {got} for {bound}"


def check_nothing_passes_the_bound(ref: ModuleType, stem: str, beta1: float, beta2: float, seed: int) -> None:
    """Random signs, sizes over six decades."""
    rng = np.random.default_rng(seed)
    grads = rng.choice([-1, 1], (60, 40)) * 10 ** rng.uniform(-6, 0, (60, 40))
    bound = np.array([largest_update(t, beta1, beta2) for t in range(1, 61)])
    assert (updates(ref, stem, grads, beta1, beta2) <= bound[:, None] * (1 + 2e-5)).all()


def check_the_first_step_is_lr_along_the_sign(ref: ModuleType, stem: str) -> None:
    g = f32([1e-3, -2.0, 40.0, -1e6])
    p, _ = ref.rules.RULES[stem].update(np.zeros(4, f32), g, ref.rules.RULES[stem].init(g), t=1, lr=0.01, wd=0.0)
    np.testing.assert_allclose(p, -0.01 * np.sign(g), rtol=2e-5)


def check_eps_stands_outside_the_root_after_the_correction(ref: ModuleType, stem: str) -> None:
    """With g = eps the first step is half of lr; an eps inside the root, or before the correction, gives others."""
    g = f32([1e-8, 1e-7, 1e-9])
    p, _ = ref.rules.RULES[stem].update(
        np.zeros(3, f32), g, ref.rules.RULES[stem].init(g), t=1, lr=1.0, eps=1e-8, wd=0.0
    )
    np.testing.assert_allclose(p, [-1 / 2, -10 / 11, -1 / 11], rtol=1e-5)


def check_no_memory_is_sign_descent(ref: ModuleType, stem: str) -> None:
    """beta1 = beta2 = eps = 0: every step is lr sgn(g)."""
    rng = np.random.default_rng(3)
    grads = rng.standard_normal((5, 30))
    np.testing.assert_allclose(updates(ref, stem, grads, 0.0, 0.0), 1.0, rtol=5e-7)


def check_amsgrad_divides_by_the_largest_second_moment(ref: ModuleType, stem: str) -> None:
    """w never shrinks; v goes on as ever, and the step divides by w alone."""
    rule, rng, zero = ref.rules.RULES[stem], np.random.default_rng(9), np.zeros(40, f32)
    words = {"lr": 1.0, "beta1": 0.5, "beta2": 0.8, "eps": 0.0, "wd": 0.0, "amsgrad": True}
    state, seen = rule.init(zero, **words), [np.zeros(40, f32)]
    for t in range(1, 30):
        g = (rng.standard_normal(40) * 10 ** rng.uniform(-2, 2)).astype(f32)
        v = f32(0.8) * state["v"] + f32(1 - 0.8) * (g * g)
        p, state = rule.update(zero, g, state, t=t, **words)
        np.testing.assert_array_equal(state["v"], v)
        seen.append(v)
        np.testing.assert_array_equal(state["w"], np.max(seen, 0))
        want = state["m"] / (1 - 0.5**t) / np.sqrt(state["w"].astype(np.float64) / (1 - 0.8**t))
        np.testing.assert_allclose(-p, want, rtol=2e-6)


def check_amsgrad_keeps_a_nan(ref: ModuleType, stem: str) -> None:
    rule, bad = ref.rules.RULES[stem], {"m": f32([0.0]), "v": f32([1.0]), "w": f32([np.nan])}
    p, state = rule.update(f32([1.0]), f32([1.0]), bad, t=3, amsgrad=True)
    assert np.isnan(p).all() and np.isnan(state["w"]).all()


def check_each_place_of_eps_is_its_own(ref: ModuleType, stem: str, eps_at: str) -> None:
    """Third step of a constant gradient g: m = (1 - b1^3) g, sqrt(v) = c g with c^2 = 1 - b2^3; the guard as large."""
    rule, g, b2 = ref.rules.RULES[stem], f32([1e-3]), 0.75
    c = sqrt(1 - b2**3)
    eps = (c * 1e-3) ** 2 if eps_at == "inside" else 1e-3
    want = {"outside": 1 / 2, "uncorrected": c / (c + 1), "inside": 1 / sqrt(2)}[eps_at]
    words = {"lr": 1.0, "beta1": 0.5, "beta2": b2, "eps": eps, "wd": 0.0, "eps_at": eps_at}
    state = rule.init(g)
    for t in (1, 2, 3):
        p, state = rule.update(np.zeros(1, f32), g, state, t=t, **words)
    np.testing.assert_allclose(-p, [want], rtol=1e-5)


def check_the_correction_can_be_left_out(ref: ModuleType, stem: str) -> None:
    """The first step is then (1 - beta1) / sqrt(1 - beta2) long: 0.2 / 0.5."""
    rule, g = ref.rules.RULES[stem], f32([3.0, -1e-2])
    words = {"lr": 1.0, "beta1": 0.8, "beta2": 0.75, "eps": 0.0, "wd": 0.0, "bias_correction": False}
    p, _ = rule.update(np.zeros(2, f32), g, rule.init(g), t=1, **words)
    np.testing.assert_allclose(p, [-0.4, 0.4], rtol=1e-6)


def check_dialects_are_named(ref: ModuleType, stem: str) -> None:
    for bad, error in (
        ({"eps_at": "around"}, ValueError),
        ({"amsgrad": 1}, TypeError),
        ({"bias_correction": 0}, TypeError),
    ):
        with pytest.raises(error, match=f"{stem}.*{next(iter(bad))} must be"):
            ref.Optimizer(stem, **bad)
