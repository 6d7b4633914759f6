"""APOLLO: the whole gradient, scaled as Adam scales a random projection of it."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.strategies import f32, follow, runs

HYPER: dict[str, Any] = {"lr": 0.02, "beta1": 0.8, "beta2": 0.97, "eps": 1e-5, "scale": 1.7, "wd": 0.4, "gap": 2}
SHAPES = [(5, 3), (3, 40), (16, 17), (12, 12)]
KINDS: list[dict[str, Any]] = [
    {"rank": 2},
    {"rank": 1, "scale_type": "tensor", "limiter": False},
    {"rank": 3, "proj_type": "left", "scale_front": True},
]
MASK = (1 << 64) - 1


def splitmix64(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def drawn(seed: int, period: int, tensor: int, n: int, rank: int) -> Any:
    """P, from whole numbers and the math module alone."""
    key = splitmix64(splitmix64(seed ^ (period * 0x9E3779B97F4A7C15 & MASK)) ^ tensor)
    out: list[float] = []
    for i in range(1 << 48, (1 << 48) + n * rank + 1, 2):
        a, b = (splitmix64((key + j) & MASK) >> 11 for j in (i, i + 1))
        radius, angle = math.sqrt(-2 * math.log((a + 1) / 2**53)), 2 * math.pi * b / 2**53
        out += [radius * math.cos(angle), radius * math.sin(angle)]
    return np.array(out[: n * rank]).reshape(n, rank) / math.sqrt(rank)


def stated(p: Any, grads: Any, kind: dict[str, Any], seed: int, tensor: int) -> Any:
    """The rule once more, in float64, one channel at a time."""
    h = HYPER | {"proj_type": "std", "scale_type": "channel", "scale_front": False, "limiter": True} | kind
    p, (rows, columns) = p.astype(float), p.shape
    left = rows < columns if h["proj_type"] == "std" else h["proj_type"] == "left"
    m: Any = 0.0
    v: Any = 0.0
    prev = 0.0
    for t, g in enumerate(grads, 1):
        G = (g if left else g.T).astype(float)  # the side that is projected first
        R = drawn(seed, (t - 1) // h["gap"] + 1, tensor, len(G), h["rank"]).T @ G
        m, v = h["beta1"] * m + (1 - h["beta1"]) * R, h["beta2"] * v + (1 - h["beta2"]) * R**2
        N = m / (np.sqrt(v) + h["eps"])
        if h["scale_type"] == "channel":
            f = [np.linalg.norm(N[:, c]) / (np.linalg.norm(R[:, c]) + 1e-8) for c in range(G.shape[1])]
            S = G * np.array(f)
        else:
            S = G * np.linalg.norm(N) / (np.linalg.norm(R) + 1e-8)
        S = S * math.sqrt(h["scale"]) if h["scale_front"] else S
        if h["limiter"]:
            norm = np.linalg.norm(S)
            grown = max(norm / (prev + 1e-8), 1.01) / 1.01 if t > 1 else 1.0
            S, prev = S / grown, norm / grown
        S = S if h["scale_front"] else S * math.sqrt(h["scale"])
        S = S if left else S.T
        p = p - h["lr"] * math.sqrt(1 - h["beta2"] ** t) / (1 - h["beta1"] ** t) * S
        p = p - h["lr"] * h["wd"] * p
    return p


@pytest.mark.parametrize("kind", KINDS, ids=["apollo", "tensor", "front"])
@given(run=runs(steps=5, shapes=SHAPES, low=-6, high=3, kinds=["plain"]), seed=st.integers(0, 2**40))
def test_it_is_its_equations_in_float64(ref: ModuleType, kind: dict[str, Any], run: Any, seed: int) -> None:
    """The second parameter of two: P depends on its number, and changes every second step."""
    p, grads = run
    other = np.ones((3, 3), f32)
    opt = ref.Optimizer("apollo", seed=seed, **(HYPER | kind))
    moved, _ = follow(opt, [other, p], [[other, g] for g in grads])
    want = stated(p, grads, kind, seed, 1)
    np.testing.assert_allclose(moved[1], want, rtol=1e-5, atol=2e-5 * np.abs(want - p).max())


def scaled(ref: ModuleType, grads: Any, **hyper: Any) -> list[Any]:
    """S of every step (with scale 1), read off the way moved."""
    rule, zero, out = ref.rules.apollo, np.zeros_like(grads[0]), []
    betas = hyper.get("beta1", 0.9), hyper.get("beta2", 0.999)
    state = rule.init(zero, **hyper)
    for t, g in enumerate(grads, 1):
        p, state = rule.update(zero, g, state, t=t, lr=1.0, **hyper)
        out.append(-p.astype(float) * (1 - betas[0] ** t) / math.sqrt(1 - betas[1] ** t))
    return out


@given(run=runs(steps=3, shapes=SHAPES, low=-3, high=3, kinds=["plain"]))
def test_mini_moves_along_the_gradient(ref: ModuleType, run: Any) -> None:
    for g, s in zip(run[1], scaled(ref, run[1], rank=1, scale=128.0, scale_type="tensor"), strict=True):
        ratio = s / g
        np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-6)
        assert ratio.flat[0] > 0


@given(run=runs(steps=3, shapes=SHAPES, low=-3, high=3, kinds=["plain"]))
def test_each_channel_moves_along_its_own_gradient(ref: ModuleType, run: Any) -> None:
    """Channels are those of the longer side: columns of a wide matrix, rows of a tall one."""
    for g, s in zip(run[1], scaled(ref, run[1], rank=2), strict=True):
        ratio = s / g
        first = ratio[:1] if g.shape[0] < g.shape[1] else ratio[:, :1]
        np.testing.assert_allclose(ratio, np.broadcast_to(first, g.shape), rtol=2e-6)
        assert (first > 0).all()


def test_channels_have_factors_of_their_own(ref: ModuleType) -> None:
    """Columns a thousand times apart move about equally far; with one factor for all they keep their sizes."""
    g = np.random.default_rng(5).standard_normal((4, 6)).astype(f32) * f32([1, 1e3, 1, 1, 1, 1])
    for scale_type, low, high in (("channel", 0.1, 10), ("tensor", 500, 5000)):
        (s,) = scaled(ref, [g], rank=2, scale_type=scale_type)
        length = np.linalg.norm(s, axis=0)
        assert low < length[1] / length[0] < high


@given(run=runs(steps=6, shapes=SHAPES, low=-3, high=3))
def test_the_norm_grows_by_one_per_cent_at_most(ref: ModuleType, run: Any) -> None:
    norms = [np.linalg.norm(s) for s in scaled(ref, run[1], rank=2)]
    for before, after in zip(norms, norms[1:]):
        assert after <= (1.01 * before + 1.1e-8) * (1 + 1e-5)


def test_without_the_limiter_the_norm_may_leap(ref: ModuleType) -> None:
    g = np.random.default_rng(1).standard_normal((4, 6)).astype(f32)
    grads = [f32(1e-3) * g, g]
    free, held = (scaled(ref, grads, rank=2, eps=1e-2, limiter=x) for x in (False, True))
    same = np.linalg.norm(free[0])
    assert np.linalg.norm(free[1]) > 1.5 * same
    np.testing.assert_allclose(np.linalg.norm(held[1]), 1.01 * same, rtol=1e-4)


def test_the_limiter_lets_the_norm_fall_and_remembers_the_limited_one(ref: ModuleType) -> None:
    """A leap is limited step after step, from where the last was limited to."""
    g = np.random.default_rng(1).standard_normal((4, 6)).astype(f32)
    s = scaled(ref, [f32(1e-3) * g, g, g], rank=2, eps=1e-2)
    np.testing.assert_allclose(np.linalg.norm(s[2]), 1.01**2 * np.linalg.norm(s[0]), rtol=1e-4)
    s = scaled(ref, [g, f32(1e-4) * g], rank=2, beta1=0.0, beta2=0.0, eps=1e-2)
    assert np.linalg.norm(s[1]) < 0.1 * np.linalg.norm(s[0])


@given(run=runs(steps=4, shapes=SHAPES, low=-2, high=2, kinds=["plain"]), c=st.floats(10, 1e4))
def test_the_gradients_unit_hardly_matters(ref: ModuleType, run: Any, c: float) -> None:
    for kind in KINDS:
        p, grads = run
        one, _ = follow(ref.Optimizer("apollo", lr=0.1, eps=1e-12, **kind), p, [g * f32(1e3) for g in grads])
        other, _ = follow(ref.Optimizer("apollo", lr=0.1, eps=1e-12, **kind), p, [g * f32(1e3 * c) for g in grads])
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4 * np.abs(one - p).max())


def test_scale_enters_as_its_root_on_either_side_of_the_limiter(ref: ModuleType) -> None:
    g = np.random.default_rng(2).standard_normal((4, 6)).astype(f32)
    grads = [[g], [f32(3) * g]]
    hyper = {"rank": 2, "lr": 0.1}
    one, a = follow(ref.Optimizer("apollo", **hyper), [0 * g], grads)
    two, b = follow(ref.Optimizer("apollo", scale=4.0, **hyper), [0 * g], grads)
    three, c = follow(ref.Optimizer("apollo", scale=4.0, scale_front=True, **hyper), [0 * g], grads)
    np.testing.assert_allclose(two[0], 2 * one[0], rtol=1e-6)
    np.testing.assert_allclose(three[0], 2 * one[0], rtol=1e-5)
    assert b[0]["prev"] == a[0]["prev"]
    np.testing.assert_allclose(c[0]["prev"], 2 * a[0]["prev"], rtol=1e-6)


def test_decay_comes_after_the_step_and_goes_by_lr(ref: ModuleType) -> None:
    g = np.random.default_rng(3).standard_normal((4, 6)).astype(f32)
    plain, _ = follow(ref.Optimizer("apollo", rank=2, lr=0.5), [g], [[g]])
    decayed, _ = follow(ref.Optimizer("apollo", rank=2, lr=0.5, wd=0.5), [g], [[g]])
    same_bits(decayed[0], plain[0] - f32(0.25) * plain[0], "p")


def test_projections_are_drawn_anew_every_gap_for_each_tensor_and_seed(ref: ModuleType) -> None:
    def first(seed: int, tensor: int, t: int) -> Any:
        g = np.eye(3, 5, dtype=f32)
        state = ref.rules.apollo.init(g, rank=2)
        hyper = {"rank": 2, "gap": 3, "beta1": 0.0, "seed": seed, "tensor": tensor}
        return ref.rules.apollo.update(g, g, state, t=t, **hyper)[1]["m"]

    seen = [first(0, 0, t) for t in range(1, 8)]
    assert all((seen[i] == seen[i - 1]).all() == (i not in (3, 6)) for i in range(1, 7))
    assert not (first(1, 0, 1) == seen[0]).any(where=seen[0] != 0)
    assert not (first(0, 1, 1) == seen[0]).any(where=seen[0] != 0)
    g = np.eye(3, 5, dtype=f32)
    _, state = follow(ref.Optimizer("apollo", rank=2, beta1=0.0, seed=9), [g, g], [[g, g]])
    same_bits(state[0]["m"], first(9, 0, 1), "tensor 0")
    same_bits(state[1]["m"], first(9, 1, 1), "tensor 1")


def test_a_projection_keeps_lengths_on_average(ref: ModuleType) -> None:
    """E |P^T g|^2 = |g|^2: over 2000 draws to 3 deviations, sqrt(2 / (r 2000))."""
    g = np.ones((8, 1), f32)
    got = [np.linalg.norm(ref.rules.apollo.update.__globals__["projection"](s, 1, 0, 8, 4).T @ g) for s in range(2000)]
    assert abs(np.mean(np.square(got)) / 8 - 1) < 3 * math.sqrt(2 / (4 * 2000))


def test_normals_are_normal(ref: ModuleType) -> None:
    stats = pytest.importorskip("scipy.stats")
    x = ref.rng.normals(ref.rng.key(5, 1, 2), 20001)
    assert x.size == 20001 and stats.kstest(x, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(x[0:20000:2], x[1::2])[0, 1]) < 0.03
    same_bits(ref.rng.normals(ref.rng.key(5, 1, 2), 7), x[:7], "a shorter draw")


def test_moments_stay_when_the_projection_changes(ref: ModuleType) -> None:
    g = np.random.default_rng(4).standard_normal((4, 6)).astype(f32)
    opt = ref.Optimizer("apollo", rank=2, gap=1, beta1=0.5, beta2=0.75)
    p, a = follow(opt, [g], [[g]])
    _, b = opt.step(p, [g], a)
    R = drawn(0, 2, 0, 4, 2).T @ g
    np.testing.assert_allclose(b[0]["m"], 0.5 * a[0]["m"] + 0.5 * R, atol=1e-6)
    np.testing.assert_allclose(b[0]["v"], 0.75 * a[0]["v"] + 0.25 * R**2, atol=1e-6)


def test_no_gradient_moves_nothing(ref: ModuleType) -> None:
    p = np.ones((3, 4), f32)
    same_bits(follow(ref.Optimizer("apollo", rank=2), p, [0 * p] * 2)[0], p, "p")


def test_the_trace_draws_what_the_step_draws(ref: ModuleType) -> None:
    """For the second tensor, under a seed."""
    g = np.random.default_rng(6).standard_normal((3, 4)).astype(f32)
    opt = ref.Optimizer("apollo", rank=2, seed=3)
    state = opt.init([g, g])
    (_, after), new = opt.step([g, g], [g, g], state)
    shown = list(ref.trace(opt, [g, g], [g, g], state))
    same_bits([x.value for x in shown if x.name == "p" and x.equation.startswith("p =")][-1], after, "p")
    same_bits([x.value for x in shown if x.name == "m"][-1], new[1]["m"], "m")


def test_mini_keeps_two_vectors_and_a_number(ref: ModuleType) -> None:
    state = ref.rules.apollo.init(np.zeros((64, 80), f32), rank=1)
    assert sum(x.nbytes for x in state.values()) == 8 * 80 + 4


REFUSED = [
    ({"rank": 2}, (4,), "ShapeError", r"params\[0\] has shape \(4,\); apollo needs two axes"),
    ({"rank": 3}, (2, 5), "ValueError", r"params\[0\] has shape \(2, 5\); rank must be <= 2, got 3"),
    ({"rank": 0}, (2, 5), "ValueError", "rank must be .*>= 1, got 0"),
    ({"rank": 1, "gap": 0}, (2, 5), "ValueError", "gap must be .*>= 1, got 0"),
    ({"rank": 1, "scale": -1.0}, (2, 5), "ValueError", "scale must be .*got -1.0"),
    ({"rank": 1, "scale_type": "row"}, (2, 5), "ValueError", "scale_type must be one of 'channel', 'tensor'"),
    ({"rank": 1, "proj_type": "full"}, (2, 5), "ValueError", "proj_type must be one of 'std', 'reverse_std', 'left'"),
]


@pytest.mark.parametrize(("hyper", "shape", "error", "words"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    ref: ModuleType, hyper: dict[str, Any], shape: tuple[int, ...], error: str, words: str
) -> None:
    with pytest.raises(ref.ShapeError if error == "ShapeError" else ValueError, match=words):
        ref.Optimizer("apollo", **hyper).init(np.zeros(shape, f32))
