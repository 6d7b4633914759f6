"""LARS: steps that are a share of the weights' norm, the learning rate inside the velocity, a layer of zeros moves."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, unsigned_zero
from tests.rules import whole
from tests.strategies import f32, follow, runs

SHAPES = [(31,), (300,), (5, 3), (3, 300), (2, 3, 17)]


def norm(x: Any) -> float:
    return math.sqrt(math.fsum(float(v) ** 2 for v in np.asarray(x).reshape(-1)))


def one_step(ref: ModuleType, p: Any, g: Any, **hyper: Any) -> Any:
    """How far the first step goes, in float64."""
    moved, _ = ref.rules.lars.update(p, g, ref.rules.lars.init(p), t=1, **hyper)
    return p.astype(np.float64) - moved


def test_the_golden_run(ref: ModuleType) -> None:
    p, _ = follow(ref.Optimizer("lars", lr=1.0, wd=0.1), [whole.P], [[g] for g in whole.G])
    assert whole.hex_words(p[0]) == "3f7f114a bfffc701 3efe0464 3e7f1082 ba9e3573 bf7f165d"


@given(run=runs(steps=1, shapes=SHAPES, low=-6), trust=st.sampled_from([1e-3, 0.1]))
def test_a_step_is_a_share_of_the_weights_norm(ref: ModuleType, run: Any, trust: float) -> None:
    """Whatever the size of the gradient; every element counts."""
    p, (g,) = run
    if norm(p) and norm(g):
        _, state = ref.rules.lars.update(p, g, ref.rules.lars.init(p), t=1, lr=0.5, trust=trust)
        assert norm(state["v"]) == pytest.approx(0.5 * trust * norm(p), rel=1e-5)


@given(run=runs(shapes=SHAPES, low=-6), k=st.integers(-6, 6))
def test_the_gradients_unit_does_not_matter(ref: ModuleType, run: Any, k: int) -> None:
    p, grads = run
    opt = ref.Optimizer("lars", lr=0.3, trust=0.1)
    one, _ = follow(opt, [p], [[g] for g in grads if g.any()])
    other, _ = follow(opt, [p], [[g * f32(2.0**k)] for g in grads if g.any()])
    same_bits(other[0], one[0], "p")


@given(run=runs(shapes=SHAPES, low=-6), k=st.integers(-6, 6))
def test_larger_weights_take_larger_steps(ref: ModuleType, run: Any, k: int) -> None:
    """p times 2^k: every step times 2^k."""
    p, grads = run
    if p.any():
        opt = ref.Optimizer("lars", lr=0.3, trust=0.1, momentum=0.5)
        one, _ = follow(opt, [p], [[g] for g in grads if g.any()])
        other, _ = follow(opt, [p * f32(2.0**k)], [[g] for g in grads if g.any()])
        same_bits(other[0], one[0] * f32(2.0**k), "p")


def test_the_norm_of_the_decay_is_added_to_that_of_the_gradient(ref: ModuleType) -> None:
    """p = (3, 4), g = (-.8, .6), wd = 1/5: norms 5, 1 and 1; optax has norm(g + p / 5) = sqrt(2) below."""
    p, g, hyper = f32([[3, 4]]), f32([[-0.8, 0.6]]), {"trust": 0.1, "wd": 0.2}
    d = np.array([[-0.2, 1.4]])
    np.testing.assert_allclose(one_step(ref, p, g, **hyper), 0.1 * 5 / (1 + 0.2 * 5) * d, rtol=1e-5)
    np.testing.assert_allclose(one_step(ref, p, g, eps=3.0, **hyper), 0.1 * 5 / (1 + 1 + 3) * d, rtol=1e-5)
    optax = one_step(ref, p, g, variant="optax", **hyper)
    np.testing.assert_allclose(optax, 0.1 * 5 / math.sqrt(2) * d, rtol=1e-5)


def test_a_change_of_learning_rate_leaves_history_alone(ref: ModuleType) -> None:
    """lr stands inside v, unlike SGD's buffer: 1/2 of the first step, then one ten times as long."""
    p, state = f32([[3, 4]]), {"v": f32([[0.5, 0.25]])}
    moved, new = ref.rules.lars.update(p, f32([[1, 0]]), state, t=2, lr=10.0, trust=0.1, momentum=0.5)
    np.testing.assert_allclose(new["v"], [[0.25 + 5, 0.125]], rtol=1e-6)
    same_bits(moved, p - new["v"], "p")


@pytest.mark.parametrize("variant", ["paper", "optax", "clip"])
def test_a_layer_of_zeros_moves(ref: ModuleType, variant: str) -> None:
    g = f32([[1.0, -2.0]])
    step = one_step(ref, np.zeros((1, 2), f32), g, lr=0.25, variant=variant, wd=0.1)
    same_bits(f32(step), 0.25 * g, "step")


def test_without_a_gradient_what_is_left_is_momentum_and_decay(ref: ModuleType) -> None:
    moved, state = ref.rules.lars.update(
        f32([[8.0]]), f32([[0.0]]), {"v": f32([[2.0]])}, t=2, lr=0.5, momentum=0.5, wd=0.25
    )
    assert (moved[0, 0], state["v"][0, 0]) == (6.0, 2.0)


def test_where_the_ratio_is_one_it_is_sgd_with_the_rate_inside(ref: ModuleType) -> None:
    """eta |p| = |g| at every step, by construction."""
    rng, p = np.random.default_rng(3), np.random.default_rng(4).standard_normal((4, 5)).astype(f32)
    state, v = ref.rules.lars.init(p), np.zeros((4, 5))
    for t in range(1, 6):
        g = rng.standard_normal((4, 5))
        g = f32(g * 0.1 * norm(p) / norm(g))
        want = p - (v := 0.9 * v + 0.5 * g)
        p, state = ref.rules.lars.update(p, g, state, t=t, lr=0.5, trust=0.1)
        np.testing.assert_allclose(p, want, rtol=1e-5, atol=1e-6)


@given(run=runs(shapes=SHAPES, low=-6))
def test_the_clip_variant_is_sgd_below_its_limit(ref: ModuleType, run: Any) -> None:
    p, grads = run
    hyper = {"lr": 0.03, "momentum": 0.8, "wd": 0.1}
    one, _ = follow(ref.Optimizer("lars", variant="clip", max_unorm=1e30, **hyper), [p], [[g] for g in grads])
    other, _ = follow(ref.Optimizer("sgd", **hyper), [p], [[g] for g in grads])
    same_bits(unsigned_zero(one[0]), unsigned_zero(other[0]), "p")


@given(run=runs(steps=2, shapes=SHAPES, low=-6))
def test_the_clip_variant_cuts_and_never_stretches(ref: ModuleType, run: Any) -> None:
    p, (g, later) = run
    if not norm(p):
        return
    rule, hyper = ref.rules.lars, {"variant": "clip", "lr": 1.0, "momentum": 0.8, "max_unorm": 0.25}
    _, state = rule.update(p, g, rule.init(p), t=1, **hyper)
    same_bits(unsigned_zero(state["v"]), unsigned_zero(g), "v")
    moved, state = rule.update(p, later, state, t=2, **hyper)
    u = norm(state["v"])
    q = min(1, 0.25 * norm(p) / u) if u else 1
    np.testing.assert_allclose(moved, p - q * state["v"].astype(np.float64), rtol=1e-5, atol=1e-6 * q * u)


def test_the_clip_variant_measures_the_momentum_too(ref: ModuleType) -> None:
    """u = (6, 8) / 2 + 0 is 5 long, the limit 1: the step is u / 5."""
    p, state = f32([[3, 4]]), {"v": f32([[6, 8]])}
    moved, _ = ref.rules.lars.update(
        p, np.zeros((1, 2), f32), state, t=2, lr=1.0, variant="clip", momentum=0.5, max_unorm=0.2
    )
    np.testing.assert_allclose(moved, [[2.4, 3.2]], rtol=1e-6)


def test_the_clip_variant_measures_without_decay(ref: ModuleType) -> None:
    """|p| = 5, |g| = 1, limit 1: not cut, though g + wd p is longer."""
    p, g = f32([[3, 4]]), f32([[0.6, 0.8]])
    step = one_step(ref, p, g, variant="clip", lr=1.0, max_unorm=0.2, wd=10.0)
    np.testing.assert_allclose(step, [[30.6, 40.8]], rtol=1e-6)


@pytest.mark.parametrize("variant", ["paper", "optax", "clip"])
@pytest.mark.parametrize("shape", [(), (3,), (3, 1)])
def test_vectors_can_be_left_out(ref: ModuleType, variant: str, shape: tuple[int, ...]) -> None:
    p, g = np.full(shape, 2, f32), np.full(shape, 100, f32)
    step = one_step(ref, p, g, variant=variant, lr=0.01, wd=0.5, exclude_1d=True)
    same = np.allclose(step, 1.0)
    assert same == (len(shape) < 2)


def test_each_tensor_has_its_own_norms(ref: ModuleType) -> None:
    opt = ref.Optimizer("lars", trust=0.1)
    p, g = [f32([[3, 4]]), f32([[30, 40]])], [f32([[1, 0]]), f32([[0, 7]])]
    moved, _ = follow(opt, p, [g])
    np.testing.assert_allclose(moved[0], [[2.5, 4]], rtol=1e-6)
    np.testing.assert_allclose(moved[1], [[30, 35]], rtol=1e-6)


@pytest.mark.parametrize(
    "bad", [{"trust": -1e-3}, {"momentum": 1.0}, {"eps": -1}, {"max_unorm": -1}, {"variant": "apex"}, {"wd": -1}]
)
def test_what_has_no_meaning_is_refused_by_name(ref: ModuleType, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"lars.*{next(iter(bad))} must be"):
        ref.Optimizer("lars", **bad)
