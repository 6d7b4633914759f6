"""LAMB: Adam's direction at the length of the weights; decay inside the direction; a layer of zeros moves."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state
from tests.rules import whole
from tests.strategies import f32, follow, runs

SHAPES = [(31,), (300,), (5, 3), (3, 300), (2, 3, 17)]
VARIANTS = ["paper", "apex", "clip"]


def norm(x: Any) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in np.asarray(x).reshape(-1)))


def one_step(ref: ModuleType, p: Any, g: Any, **hyper: Any) -> Any:
    """How far the first step goes, in float64."""
    moved, _ = ref.rules.lamb.update(p, g, ref.rules.lamb.init(p), t=1, **hyper)
    return p.astype(np.float64) - moved


def test_the_golden_run(ref: ModuleType) -> None:
    p, _ = follow(ref.Optimizer("lamb", lr=1e-2, wd=0.01), [whole.P], [[g] for g in whole.G])
    assert whole.hex_words(p[0]) == "3f780e00 c00009a9 3ef3172b 3e63daee bc111ee7 bf7a4ac8"


@given(run=runs(steps=2, shapes=SHAPES, low=-6, kinds=["plain", "zeros"]), wd=st.sampled_from([0.0, 0.3]))
def test_a_step_is_as_long_as_the_weights_times_lr(ref: ModuleType, run: Any, wd: float) -> None:
    """Whatever Adam's direction is long; every element counts."""
    p, grads = run
    state = ref.rules.lamb.init(p)
    for t, g in enumerate(grads, 1):
        moved, state = ref.rules.lamb.update(p, g, state, t=t, lr=64.0, wd=wd)
        if norm(p) and any(x.any() for x in grads[:t]):
            assert norm(moved - p.astype(np.float64)) == pytest.approx(64 * norm(p), rel=1e-4)


def test_the_equations_in_float64(ref: ModuleType) -> None:
    """Moments as sums of weighted gradients, decay in the direction, one ratio for all."""
    rng = np.random.default_rng(5)
    p, grads = rng.standard_normal((6, 7)).astype(f32), rng.standard_normal((8, 6, 7)).astype(f32)
    q, wide = p.astype(np.float64), grads.astype(np.float64)
    hyper = {"lr": 0.02, "beta1": 0.8, "beta2": 0.97, "eps": 1e-2, "wd": 0.4}
    for t in range(1, 9):
        w = [(1 - b) * b ** np.arange(t - 1, -1, -1.0)[:, None, None] for b in (0.8, 0.97)]
        m, v = (w[0] * wide[:t]).sum(0) / (1 - 0.8**t), (w[1] * wide[:t] ** 2).sum(0) / (1 - 0.97**t)
        u = m / (np.sqrt(v) + 1e-2) + 0.4 * q
        q = q - 0.02 * norm(q) / norm(u) * u
    moved, _ = follow(ref.Optimizer("lamb", **hyper), [p], [[g] for g in grads])
    np.testing.assert_allclose(moved[0], q, rtol=1e-5, atol=1e-6)


@given(run=runs(shapes=SHAPES, low=-6), k=st.integers(-6, 6))
def test_the_gradients_unit_does_not_matter(ref: ModuleType, run: Any, k: int) -> None:
    p, grads = run
    one, _ = follow(ref.Optimizer("lamb", eps=1e-7, wd=0.1), [p], [[g] for g in grads])
    scaled = ref.Optimizer("lamb", eps=1e-7 * 2.0**k, wd=0.1)
    other, _ = follow(scaled, [p], [[g * f32(2.0**k)] for g in grads])
    same_bits(other[0], one[0], "p")


@given(run=runs(shapes=SHAPES, low=-6), k=st.integers(-6, 6))
def test_larger_weights_take_larger_steps(ref: ModuleType, run: Any, k: int) -> None:
    """p times 2^k, no decay: every step times 2^k."""
    p, grads = run
    if p.any() and all(g.any() for g in grads):
        opt = ref.Optimizer("lamb", lr=0.1, wd=0.0)
        one, _ = follow(opt, [p], [[g] for g in grads])
        other, _ = follow(opt, [p * f32(2.0**k)], [[g] for g in grads])
        same_bits(other[0], one[0] * f32(2.0**k), "p")


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_of_zeros_takes_adams_step(ref: ModuleType, variant: str) -> None:
    step = one_step(ref, np.zeros((1, 2), f32), f32([[3.0, -2.0]]), lr=0.25, wd=0.0, variant=variant)
    np.testing.assert_allclose(step, [[0.25, -0.25]], rtol=1e-5)


def test_without_a_gradient_decay_alone_sets_the_direction(ref: ModuleType) -> None:
    """u = wd p has the weights' direction, and the step their length times lr, whatever wd."""
    step = one_step(ref, f32([[3.0, -4.0]]), f32([[0.0, 0.0]]), lr=0.1, wd=1e-3)
    np.testing.assert_allclose(step, [[0.3, -0.4]], rtol=1e-5)


@pytest.mark.parametrize(
    ("bounds", "length"),
    [({}, 5.0), ({"phi_high": 2.0}, 2.0), ({"phi_low": 10.0}, 10.0), ({"phi_low": 1.0, "phi_high": 7.0}, 5.0)],
)
def test_phi_keeps_the_norm_of_the_weights_between_its_bounds(ref: ModuleType, bounds: Any, length: float) -> None:
    step = one_step(ref, f32([[3.0, 4.0]]), f32([[0.5, 0.25]]), lr=0.5, **bounds)
    assert norm(step) == pytest.approx(0.5 * length, rel=1e-5)


def test_apex_leaves_tensors_without_decay_to_adam(ref: ModuleType) -> None:
    p, g = f32([[3.0, 4.0]]), f32([[0.5, -0.25]])
    np.testing.assert_allclose(one_step(ref, p, g, lr=0.5, wd=0.0, variant="apex"), [[0.5, -0.5]], rtol=1e-5)
    paper = one_step(ref, p, g, lr=0.5, wd=0.1)
    np.testing.assert_allclose(one_step(ref, p, g, lr=0.5, wd=0.1, variant="apex"), paper, rtol=0)


def test_the_clip_variant_cuts_and_never_stretches(ref: ModuleType) -> None:
    """u = (1, -1) is sqrt(2) long: the limits 10 and 1/2 of |p| = 5 leave it, a tenth cuts it; then p decays."""
    p, g = f32([[3.0, 4.0]]), f32([[0.5, -0.25]])
    for limit, length in ((10.0, math.sqrt(2)), (0.5, math.sqrt(2)), (0.1, 0.5)):
        u = np.array([[1.0, -1.0]]) * length / math.sqrt(2)
        moved, _ = ref.rules.lamb.update(
            p, g, ref.rules.lamb.init(p), t=1, lr=0.5, wd=0.2, variant="clip", max_unorm=limit
        )
        np.testing.assert_allclose(moved, (p - 0.5 * u) * 0.9, rtol=1e-5)


def test_the_correction_can_be_left_out(ref: ModuleType) -> None:
    """At t = 1 u is then (1 - beta1) / sqrt(1 - beta2) sgn(g) = 2/5 sgn(g), beside wd p."""
    p, g = f32([[3.0, 4.0]]), f32([[0.5, -0.25]])
    u = np.array([[0.4 + 0.3, -0.4 + 0.4]])
    step = one_step(ref, p, g, lr=0.5, beta1=0.8, beta2=0.75, wd=0.1, bias_correction=False)
    np.testing.assert_allclose(step, 0.5 * 5 * u / norm(u), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(), (3,), (3, 1)])
def test_vectors_can_be_left_out(ref: ModuleType, variant: str, shape: tuple[int, ...]) -> None:
    p, g = np.full(shape, 8, f32), np.full(shape, 100, f32)
    step = one_step(ref, p, g, variant=variant, lr=0.01, wd=0.5, exclude_1d=True)
    same = np.allclose(step, 0.01, rtol=1e-4)
    assert same == (len(shape) < 2)


@given(run=runs(shapes=[(5, 3), (3, 300)], low=-6))
def test_the_moments_are_adamws(ref: ModuleType, run: Any) -> None:
    """Neither the ratio nor the decay enters them."""
    p, grads = run
    _, state = follow(ref.Optimizer("lamb", wd=0.3), [p], [[g] for g in grads])
    _, same = follow(ref.Optimizer("adamw"), [p], [[g] for g in grads])
    same_state(state[0], same[0])


def test_each_tensor_has_its_own_norms(ref: ModuleType) -> None:
    p, g = [f32([[3, 4]]), f32([[30, 40]])], [f32([[1, 0]]), f32([[0, 7]])]
    moved, _ = follow(ref.Optimizer("lamb", lr=0.1, wd=0.0), p, [g])
    np.testing.assert_allclose(moved[0], [[2.5, 4]], rtol=1e-5)
    np.testing.assert_allclose(moved[1], [[30, 35]], rtol=1e-5)


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        ({"phi_low": 2.0, "phi_high": 1.0}, "phi_low must be <= phi_high, got phi_low=2.0, phi_high=1.0"),
        ({"phi_low": -1}, "phi_low must be"),
        ({"max_unorm": -1}, "max_unorm must be"),
        ({"beta1": 1.0}, "beta1 must be"),
        ({"variant": "nvlamb"}, "variant must be"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(ref: ModuleType, bad: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"lamb.*{named}"):
        ref.Optimizer("lamb", **bad)
