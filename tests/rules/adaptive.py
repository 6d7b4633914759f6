"""Laws that Adam and AdamW share; each of their test files runs them on its own rule."""

from __future__ import annotations

from math import sqrt
from types import ModuleType

import numpy as np

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
