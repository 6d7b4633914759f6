"""GaLore: moments of a projected gradient, a step that is projected back."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits, same_state
from tests.rules.adaptive import largest_update
from tests.strategies import f32, follow, runs

HYPER: dict[str, Any] = {"lr": 0.02, "beta1": 0.8, "beta2": 0.97, "eps": 1e-5, "scale": 0.7, "wd": 0.4}
SHAPES = [(5, 3), (3, 40), (16, 17), (12, 12)]
SIDES = ["left", "right", "full"]


def basis(rng: np.random.Generator, n: int, r: int) -> Any:
    return np.linalg.qr(rng.standard_normal((n, r)))[0].astype(f32)


def given_bases(ref: ModuleType, p: Any, side: str, rank: int, seed: int) -> Any:
    """A zero state with bases of our own, good for every step but those that look for new ones."""
    rng, state = np.random.default_rng(seed), ref.rules.galore.init(p, rank=rank, proj_type=side)
    n = {"P": p.shape[0], "Q": p.shape[1]}
    return {k: basis(rng, n[k], rank) if k in n else x for k, x in state.items()}


def gaps(rng: np.random.Generator, shape: Any) -> Any:
    """A matrix whose singular values halve, so that its directions are well told apart."""
    k = min(shape)
    s = 2.0 ** -np.arange(k)
    return (basis(rng, shape[0], k) * s @ basis(rng, shape[1], k).T).astype(f32)


def stated(p: Any, grads: Any, P: Any, Q: Any) -> Any:
    """The rule once more in float64, from t=2 on, with bases that stay."""
    h, p = HYPER, p.astype(float)
    m: Any = 0.0
    v: Any = 0.0
    for t, g in enumerate(grads, 2):
        R = P.T @ g.astype(float) @ Q
        m, v = h["beta1"] * m + (1 - h["beta1"]) * R, h["beta2"] * v + (1 - h["beta2"]) * R**2
        step = h["lr"] * math.sqrt(1 - h["beta2"] ** t) / (1 - h["beta1"] ** t)
        p = p - step * h["scale"] * (P @ (m / (np.sqrt(v) + h["eps"])) @ Q.T)
        p = p - h["lr"] * h["wd"] * p
    return p


@pytest.mark.parametrize("side", SIDES)
@given(run=runs(steps=4, shapes=SHAPES, low=-7, high=3, kinds=["plain"]), seed=st.integers(0, 2**32 - 1))
def test_between_two_looks_it_is_its_equations_in_float64(ref: ModuleType, side: str, run: Any, seed: int) -> None:
    p, grads = run
    state = given_bases(ref, p, side, 2, seed)
    P, Q = (state[k].astype(float) if k in state else np.eye(n) for k, n in zip("PQ", p.shape, strict=True))
    want = stated(p, grads, P, Q)
    q = p
    for t, g in enumerate(grads, 2):
        q, state = ref.rules.galore.update(q, g, state, t=t, rank=2, proj_type=side, **HYPER)
    np.testing.assert_allclose(q, want, rtol=1e-5, atol=1e-5 * np.abs(want - p).max())


@pytest.mark.parametrize("shape", SHAPES)
def test_bases_span_the_strongest_directions(ref: ModuleType, shape: Any) -> None:
    """P P^T and Q Q^T project on the leading eigenvectors of g g^T and g^T g: another way to them."""
    g = gaps(np.random.default_rng(1), shape)
    _, state = follow(ref.Optimizer("galore", rank=2, proj_type="full"), [g], [[g]])
    for name, gram in (("P", g @ g.T.astype(float)), ("Q", g.T @ g.astype(float))):
        kept = np.linalg.eigh(gram)[1][:, -2:]
        B = state[0][name].astype(float)
        np.testing.assert_allclose(B @ B.T, kept @ kept.T, atol=1e-5)
        np.testing.assert_allclose(B.T @ B, np.eye(2), atol=1e-6)


@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from(SHAPES))
def test_the_largest_entry_of_a_direction_is_positive(ref: ModuleType, seed: int, shape: Any) -> None:
    g = np.random.default_rng(seed).standard_normal(shape).astype(f32)
    _, state = follow(ref.Optimizer("galore", rank=3, proj_type="full"), [g], [[g]])
    for name in "PQ":
        for column in state[0][name].T:
            assert column[np.abs(column).argmax()] > 0


@pytest.mark.parametrize("kind", ["std", "reverse_std"])
@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_std_projects_to_the_shorter_side(ref: ModuleType, kind: str, shape: Any) -> None:
    tall = shape[0] >= shape[1]
    side = "right" if tall == (kind == "std") else "left"
    p = gaps(np.random.default_rng(2), shape)
    for rank in (1, min(shape)):
        one, a = follow(ref.Optimizer("galore", rank=rank, proj_type=kind), [p], [[p], [-p]])
        other, b = follow(ref.Optimizer("galore", rank=rank, proj_type=side), [p], [[p], [-p]])
        same_bits(one[0], other[0], "p")
        same_state(a[0], b[0])
        assert a[0]["m"].shape == ((shape[0], rank) if side == "right" else (rank, shape[1]))


def test_directions_are_found_at_the_first_step_and_every_gap_after(ref: ModuleType) -> None:
    rng = np.random.default_rng(3)
    opt = ref.Optimizer("galore", rank=2, gap=3, proj_type="left")
    p = np.zeros((4, 6), f32)
    state, seen = opt.init([p]), []
    for _ in range(8):
        g = rng.standard_normal(p.shape).astype(f32)
        (p,), state = opt.step([p], [g], state)
        seen.append(state[0]["P"])
        fresh = follow(ref.Optimizer("galore", rank=2, proj_type="left"), [p], [[g]])[1][0]["P"]
        assert (state[0]["P"] == fresh).all() == (len(seen) in (1, 4, 7))
    assert all((seen[i] == seen[i - 1]).all() == (i not in (3, 6)) for i in range(1, 8))


def test_new_directions_leave_the_moments_as_they_are(ref: ModuleType) -> None:
    """At a refresh the old m and v, neither turned nor cleared, meet the new R."""
    rng = np.random.default_rng(4)
    g, h = gaps(rng, (4, 6)), gaps(rng, (4, 6))
    opt = ref.Optimizer("galore", rank=2, gap=1, beta1=0.5, beta2=0.75)
    (p,), a = follow(opt, [g], [[g]])
    (p,), b = opt.step([p], [h], a)
    R = b[0]["P"].T.astype(float) @ h
    np.testing.assert_allclose(b[0]["m"], 0.5 * a[0]["m"] + 0.5 * R, atol=1e-6)
    np.testing.assert_allclose(b[0]["v"], 0.75 * a[0]["v"] + 0.25 * R**2, atol=1e-6)


@pytest.mark.parametrize("side", SIDES)
@given(run=runs(steps=3, shapes=SHAPES, low=-3, high=3, kinds=["plain"]), seed=st.integers(0, 2**32 - 1))
def test_a_period_moves_the_weights_inside_the_span_of_its_bases(
    ref: ModuleType, side: str, run: Any, seed: int
) -> None:
    p, grads = run
    state = given_bases(ref, p, side, 2, seed)
    P, Q = state.get("P"), state.get("Q")
    moved = np.zeros_like(p)
    for t, g in enumerate(grads, 2):
        moved, state = ref.rules.galore.update(moved, g, state, t=t, lr=1.0, rank=2, proj_type=side)
    size = np.linalg.norm(moved)
    assert np.linalg.svd(moved, compute_uv=False)[2] <= 1e-5 * size
    if P is not None:
        assert np.linalg.norm(moved - P @ (P.T @ moved)) <= 1e-5 * size
    if Q is not None:
        assert np.linalg.norm(moved - moved @ Q @ Q.T) <= 1e-5 * size


@given(run=runs(steps=3, shapes=SHAPES, low=-3, high=3, kinds=["plain"]), side=st.sampled_from(["std", "full"]))
def test_with_all_directions_and_no_moments_it_is_sgd(ref: ModuleType, run: Any, side: str) -> None:
    p, grads = run
    if side == "full" and p.shape[0] != p.shape[1]:
        side = "std"
    hyper = {"lr": 0.5, "scale": 0.5, "inner": "sgd", "gap": 2, "proj_type": side}
    moved, _ = follow(ref.Optimizer("galore", rank=min(p.shape), **hyper), p, grads)
    want, _ = follow(ref.Optimizer("sgd", lr=0.25), p, grads)
    np.testing.assert_allclose(moved, want, atol=1e-5 * max(np.abs(g).max() for g in grads), rtol=1e-5)


@given(run=runs(steps=3, shapes=SHAPES, low=-3, high=3, kinds=["plain"]))
def test_scale_stretches_the_step_and_leaves_the_decay(ref: ModuleType, run: Any) -> None:
    p, grads = run
    one, _ = follow(ref.Optimizer("galore", lr=0.5, rank=2), [p * 0], [[g] for g in grads])
    other, _ = follow(ref.Optimizer("galore", lr=0.5, rank=2, scale=1.0), [p * 0], [[g] for g in grads])
    same_bits(other[0], f32(4) * one[0], "4 times the way")
    (shrunk,), _ = follow(ref.Optimizer("galore", lr=0.5, rank=2, scale=0.125, wd=0.5), [p], [[p * 0]])
    same_bits(shrunk, p - f32(0.25) * p, "decay")


def test_decay_comes_after_the_step(ref: ModuleType) -> None:
    """R = 2, m = 2, N = 1 (eps aside): p = (4 - .5) .75, and not 4 * .75 - .5."""
    opt = ref.Optimizer("galore", lr=0.5, scale=1.0, rank=1, beta1=0.0, beta2=0.0, eps=0.0, wd=0.5)
    moved, _ = follow(opt, f32([[4]]), [f32([[2]])])
    assert moved.tolist() == [[2.625]]


def test_eps_is_added_before_the_bias_correction(ref: ModuleType) -> None:
    """|g| sqrt(1 - beta2) = eps halves the first step; after the correction it would hardly be felt."""
    opt = ref.Optimizer("galore", lr=1.0, scale=1.0, rank=1, beta2=0.99, eps=1e-6)
    moved, _ = follow(opt, f32([[0]]), [f32([[1e-5]])])
    np.testing.assert_allclose(moved, [[-0.5]], rtol=1e-5)


@given(run=runs(steps=12, shapes=SHAPES, low=-3, high=3))
def test_no_step_is_longer_than_adams_in_the_projected_space(ref: ModuleType, run: Any) -> None:
    _, grads = run
    opt, zero = ref.Optimizer("galore", lr=1.0, scale=1.0, rank=2, gap=5, eps=1e-30), np.zeros_like(run[0])
    state = opt.init([zero])
    for t, g in enumerate(grads, 1):
        (p,), state = opt.step([zero], [g], state)
        bound = largest_update(t, 0.9, 0.999) * math.sqrt(state[0]["m"].size)
        assert np.linalg.norm(p.astype(float)) <= bound * (1 + 1e-4)


@given(run=runs(steps=3, shapes=[(3, 40), (16, 17)], low=-3, high=3, kinds=["plain"]))
def test_8_bit_galore_codes_the_moments_and_keeps_the_bases(ref: ModuleType, run: Any) -> None:
    p, grads = run
    opt, plain = ref.Optimizer("galore", "dynamic8", rank=2, **HYPER), ref.Optimizer("galore", rank=2, **HYPER)
    ps, state = [p], opt.init([p])
    for g in grads:
        opened = [{k: x.decode() if hasattr(x, "decode") else x for k, x in state[0].items()}]
        want, new = plain.step(ps, [g], opened)
        ps, state = opt.step(ps, [g], state)
        same_bits(ps[0], want[0], "p")
        same_bits(state[0]["P"], new[0]["P"], "P")
        same_bits(state[0]["m"].codes, ref.codecs.dynamic8.encode(new[0]["m"]).codes, "m")
        same_bits(state[0]["v"].codes, ref.codecs.dynamic8.encode(new[0]["v"], signed=False).codes, "v")


def test_a_gradient_without_directions_shows(ref: ModuleType) -> None:
    """NaN and Inf have no singular vectors: the tensor becomes NaN, and no error comes from the decomposition."""
    for bad in (np.nan, np.inf):
        g = f32([[1, 2, 3], [4, bad, 6]])
        (moved,), _ = follow(ref.Optimizer("galore", rank=1), [np.ones_like(g)], [[g]])
        assert np.isnan(moved).all()


def test_no_gradient_moves_nothing(ref: ModuleType) -> None:
    p = np.ones((3, 4), f32)
    same_bits(follow(ref.Optimizer("galore", rank=2), p, [0 * p] * 2)[0], p, "p")


@pytest.mark.parametrize(("side", "entries"), [("left", 256 + 640), ("right", 320 + 512), ("full", 576 + 32)])
def test_bytes_are_of_bases_and_projected_moments(ref: ModuleType, side: str, entries: int) -> None:
    state = ref.rules.galore.init(np.zeros((64, 80), f32), rank=4, proj_type=side)
    assert sum(x.nbytes for x in state.values()) == 4 * entries


REFUSED = [
    ({"rank": 2}, (4,), "ShapeError", r"params\[0\] has shape \(4,\); galore needs two axes"),
    ({"rank": 2}, (2, 3, 4), "ShapeError", r"\(2, 3, 4\); galore needs two axes"),
    ({"rank": 3}, (2, 5), "ValueError", r"params\[0\] has shape \(2, 5\); rank must be <= 2, got 3"),
    ({"rank": 0}, (2, 5), "ValueError", "rank must be .*>= 1, got 0"),
    ({"rank": 1.5}, (2, 5), "ValueError", "rank must be a whole number, got 1.5"),
    ({"rank": 1, "gap": 0}, (2, 5), "ValueError", "gap must be .*>= 1, got 0"),
    ({"rank": 1, "scale": -0.5}, (2, 5), "ValueError", "scale must be .*got -0.5"),
    ({"rank": 1, "proj_type": "top"}, (2, 5), "ValueError", "proj_type must be one of 'std', 'reverse_std', 'left'"),
]


@pytest.mark.parametrize(("hyper", "shape", "error", "words"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    ref: ModuleType, hyper: dict[str, Any], shape: tuple[int, ...], error: str, words: str
) -> None:
    with pytest.raises(ref.ShapeError if error == "ShapeError" else ValueError, match=words):
        ref.Optimizer("galore", **hyper).init(np.zeros(shape, f32))
