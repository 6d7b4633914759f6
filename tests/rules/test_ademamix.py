"""AdEMAMix: AdamW and a slow mean that is not corrected; two ramps."""

from __future__ import annotations

from math import log, sqrt
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import parts, same_bits
from tests.rules.adaptive import largest_update
from tests.strategies import assignments, f32, follow, records, runs

ADAM = {"lr": 0.02, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "wd": 0.3}


@given(run=runs(), beta1=st.sampled_from([0.8, 0.0]), data=st.data())
def test_without_the_slow_mean_it_is_adamw(ref: ModuleType, run: Any, beta1: float, data: Any) -> None:
    """Bit for bit, through any codecs."""
    p, grads = run
    codecs = records(ref, data.draw(assignments(("m", "v"))))
    hyper = ADAM | {"beta1": beta1}
    mine = {"m1": codecs["m"], "v": codecs["v"]} if beta1 else {"v": codecs["v"]}
    adamw = ref.Optimizer("adamw", codecs if beta1 else {"v": codecs["v"]}, **hyper)
    one, state = follow(ref.Optimizer("ademamix", mine, alpha=0.0, **hyper), [p], [[g] for g in grads])
    other, same = follow(adamw, [p], [[g] for g in grads])
    same_bits(one[0], other[0], "p")
    for a, b in zip(parts(state[0]["v"]).values(), parts(same[0]["v"]).values(), strict=True):
        same_bits(a, b, "v")


@given(run=runs())
def test_with_equal_betas_both_means_are_one(ref: ModuleType, run: Any) -> None:
    """And the step is AdamW's times 1 + alpha bc1."""
    p, grads = np.zeros_like(run[0]), run[1][:1]
    hyper = ADAM | {"wd": 0.0, "eps": 0.0}
    with np.errstate(invalid="ignore"):
        moved, state = follow(ref.Optimizer("ademamix", beta3=0.8, alpha=5.0, **hyper), [p], [[g] for g in grads])
        adamw, _ = follow(ref.Optimizer("adamw", **hyper), [p], [[g] for g in grads])
    same_bits(state[0]["m2"], state[0]["m1"], "m2")
    np.testing.assert_allclose(moved[0], adamw[0] * (1 + 5 * (1 - 0.8)), rtol=2e-6)


def test_the_slow_mean_is_not_corrected(ref: ModuleType) -> None:
    """The first step is lr (1 + alpha (1 - beta3)), not lr (1 + alpha)."""
    g = f32([2.0, -30.0])
    moved, _ = follow(ref.Optimizer("ademamix", lr=1.0, alpha=5.0, beta3=0.9), np.zeros(2, f32), [g])
    np.testing.assert_allclose(moved, [-1.5, 1.5], rtol=1e-6)


def test_the_mixture_in_float64(ref: ModuleType) -> None:
    """Thirty steps against sums of weighted gradients."""
    rng = np.random.default_rng(6)
    grads = rng.standard_normal((30, 40)).astype(f32)
    b1, b2, b3, alpha = 0.8, 0.97, 0.995, 3.0
    age = np.arange(29, -1, -1.0)[:, None]
    wide = grads.astype(np.float64)
    m1, m2, v = ((1 - b) * (b**age * x).sum(0) for b, x in ((b1, wide), (b3, wide), (b2, wide**2)))
    want = -(m1 / (1 - b1**30) + alpha * m2) / (np.sqrt(v / (1 - b2**30)) + 1e-3)
    zero = np.zeros(40, f32)
    hyper = {"lr": 1.0, "beta1": b1, "beta2": b2, "beta3": b3, "alpha": alpha, "eps": 1e-3}
    state = ref.rules.ademamix.init(zero)
    for t, g in enumerate(grads, 1):
        p, state = ref.rules.ademamix.update(zero, g, state, t=t, **hyper)
    np.testing.assert_allclose(p, want, rtol=2e-5, atol=2e-6)


def slow(ref: ModuleType, t: int, **hyper: Any) -> tuple[float, float]:
    """(1 - beta3, alpha) at step t, read off one gradient of 1 from zero states; beta1 = 0, so that num is 1 + a m2."""
    zero, one = np.zeros(1, f32), np.ones(1, f32)
    state = ref.rules.ademamix.init(zero, **hyper)
    p, new = ref.rules.ademamix.update(zero, one, state, t=t, lr=1.0, beta2=0.0, eps=0.0, **hyper)
    m1 = float(new["m1"][0]) / (1 - hyper["beta1"] ** t) if hyper.get("beta1") else 1.0
    return float(new["m2"][0]), (-float(p[0]) - m1) / float(new["m2"][0])


def test_the_ramp_of_beta3_is_the_published_one(ref: ModuleType) -> None:
    published = {250: 0.9996011953686023, 500: 0.9998001996254803, 1000: 0.9999, 5000: 0.9999}
    for t, beta3 in published.items():
        assert slow(ref, t, beta1=0.9, t_beta3=1000)[0] == f32(1 - beta3), t


@pytest.mark.parametrize(("beta1", "beta3"), [(0.9, 0.9999), (0.5, 0.99)])
def test_the_half_life_grows_in_proportion(ref: ModuleType, beta1: float, beta3: float) -> None:
    """1 / log(beta3) is linear in t: at t = 0 that of beta1."""
    ends = 1 / log(beta1), 1 / log(beta3)
    for t in (1, 7, 50, 99):
        omb, _ = slow(ref, t, beta1=beta1, beta3=beta3, t_beta3=100)
        assert 1 / np.log1p(-omb) == pytest.approx(ends[0] + (ends[1] - ends[0]) * t / 100, rel=1e-5)


def test_the_ramp_of_alpha_is_linear(ref: ModuleType) -> None:
    got = [slow(ref, t, beta1=0.0, beta3=0.5, alpha=4.0, t_alpha=100)[1] for t in (1, 25, 99, 100, 1000)]
    assert got == pytest.approx([0.04, 1.0, 3.96, 4.0, 4.0], rel=1e-5)


@pytest.mark.parametrize("beta3", [0.9, 0.99, 0.9999])
@given(seed=st.integers(0, 2**32 - 1))
def test_no_update_passes_the_bound(ref: ModuleType, beta3: float, seed: int) -> None:
    """B_t for the fast mean, and for the slow one the same by Cauchy-Schwarz, without the correction."""
    rng, zero = np.random.default_rng(seed), np.zeros(30, f32)
    grads = (rng.choice([-1, 1], (40, 30)) * 10 ** rng.uniform(-6, 0, (40, 30))).astype(f32)
    hyper = {"beta1": 0.8, "beta2": 0.97, "beta3": beta3, "eps": 0.0, "alpha": 5.0}
    state = ref.rules.ademamix.init(zero)
    for t, g in enumerate(grads, 1):
        p, state = ref.rules.ademamix.update(zero, g, state, t=t, lr=1.0, **hyper)
        slowly = largest_update(t, beta3, 0.97) * (1 - beta3**t)
        assert np.abs(p).max() <= (largest_update(t, 0.8, 0.97) + 5 * slowly) * (1 + 2e-5)


@pytest.mark.parametrize(("order", "want"), [("before", 2.5), ("after", 2.625), ("additive", 2.5)])
def test_the_orders_of_decay_differ_by_the_square_of_lr(ref: ModuleType, order: str, want: float) -> None:
    """p = 4, wd = 1/4, lr = 1/2, a first step of (1 + 2/2) lr = 1: 4 (7/8) - 1, (4 - 1) 7/8, 4 - (2 + 1) / 2."""
    opt = ref.Optimizer("ademamix", lr=0.5, wd=0.25, beta3=0.5, alpha=2.0, eps=0.0, decay_order=order)
    np.testing.assert_allclose(follow(opt, f32([4.0]), [f32([3.0])])[0], [want], rtol=1e-6)


@pytest.mark.parametrize(("beta1", "bytes_each"), [(0.9, 12), (0.0, 8)])
def test_the_bytes_are_four_for_each_state(ref: ModuleType, beta1: float, bytes_each: int) -> None:
    state = ref.rules.ademamix.init(np.zeros((3, 5), f32), beta1=beta1)
    assert sum(x.nbytes for x in state.values()) == 15 * bytes_each


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"alpha": -1}, "alpha"),
        ({"t_alpha": 0}, "t_alpha"),
        ({"t_beta3": 0}, "t_beta3"),
        ({"t_beta3": 2.5}, "t_beta3"),
        ({"beta3": 1.0}, "beta3"),
        ({"beta1": 0.0, "t_beta3": 10}, "t_beta3 needs beta1 > 0"),
        ({"beta3": 0.0, "t_beta3": 10}, "t_beta3 needs beta1 > 0 and beta3 > 0"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(ref: ModuleType, bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"ademamix.*{named}"):
        ref.Optimizer("ademamix", **bad)


def test_a_bound_that_is_reached(ref: ModuleType) -> None:
    """The slow mean alone: gradients in the ratio beta3 / beta2, growing into the past, attain its share."""
    t, beta2, beta3 = 40, 0.97, 0.99
    grads = (beta3 / beta2) ** np.arange(t - 1, -1, -1.0)
    zero = np.zeros(1, f32)
    state = ref.rules.ademamix.init(zero, beta1=0.0)
    for i, g in enumerate(grads, 1):
        p, state = ref.rules.ademamix.update(
            zero, f32([g]), state, t=i, lr=1.0, beta1=0.0, beta2=beta2, beta3=beta3, alpha=1e4, eps=0.0
        )
    want = 1e4 * largest_update(t, beta3, beta2) * (1 - beta3**t) + grads[-1] / sqrt(
        (1 - beta2) * (beta2 ** np.arange(t - 1, -1, -1.0) * grads**2).sum() / (1 - beta2**t)
    )
    np.testing.assert_allclose(-p, [want], rtol=2e-5)
