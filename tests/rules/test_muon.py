"""Muon: all directions of the momentum move about equally far."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import same_bits
from tests.strategies import arrays, f32, follow, runs

SHAPES = [(5, 3), (3, 40), (1, 7), (17, 16)]
planes = arrays(SHAPES, -4, 3, ["plain", "outlier"])
LOW, HIGH = 0.6818, 1.2024
"""Where five steps take every singular value that is at least 1.55e-3 of the norm."""


def direction(ref: ModuleType, g: Any, **hyper: Any) -> Any:
    """X of one step without memory: with lr 1, mu 0 and m <= n the weights move by it."""
    (p,), _ = follow(ref.Optimizer("muon", lr=1.0, momentum=0.0, **hyper), [np.zeros_like(g)], [[g]])
    return -p.astype(float) / math.sqrt(max(1.0, g.shape[0] / g.shape[1]))


def rotation(rng: np.random.Generator, n: int) -> Any:
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def close(got: Any, want: Any, part: float = 1e-6) -> None:
    """To a part of the norm."""
    assert np.linalg.norm(got - want) <= part * max(np.linalg.norm(want), 1e-30)


def polynomial(s: Any, steps: int = 5) -> Any:
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


@pytest.mark.parametrize("steps", [0, 1, 5])
@given(g=planes)
def test_the_polynomial_acts_on_singular_values(ref: ModuleType, steps: int, g: Any) -> None:
    """Through a singular value decomposition, which Newton-Schulz needs not."""
    u, s, vt = np.linalg.svd(g.astype(float), full_matrices=False)
    want = u * polynomial(s / np.linalg.norm(s), steps) @ vt
    close(direction(ref, g, ns_steps=steps), want, 3e-6)


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
@given(seed=st.integers(0, 2**32 - 1))
def test_singular_values_end_around_one(ref: ModuleType, shape: Any, seed: int) -> None:
    """Any spectrum over two decades; nothing is ever stretched beyond 1.2024."""
    rng = np.random.default_rng(seed)
    k = min(shape)
    s = 10 ** rng.uniform(-1.9, 0, k)
    g = (rotation(rng, shape[0])[:, :k] * s @ rotation(rng, shape[1])[:k]).astype(f32)
    got = np.linalg.svd(direction(ref, g), compute_uv=False)
    assert got.max() <= HIGH + 1e-5
    assert got[s[np.argsort(-s)] / np.linalg.norm(s) > 2e-3].min() >= LOW - 1e-4


@given(g=planes, k=st.integers(-8, 8))
def test_neither_sign_nor_unit_of_the_gradient_matter(ref: ModuleType, g: Any, k: int) -> None:
    x = direction(ref, g, eps=0.0)
    same_bits(direction(ref, -g, eps=0.0), -x, "-g")
    same_bits(direction(ref, g * f32(2.0**k), eps=0.0), x, "2^k g")
    close(direction(ref, g * f32(3.7), eps=0.0), x)


@given(g=planes)
def test_transposing_the_gradient_transposes_the_direction(ref: ModuleType, g: Any) -> None:
    close(direction(ref, np.ascontiguousarray(g.T)), direction(ref, g).T)


@given(g=arrays([(5, 3), (3, 8), (8, 8)], -2, 1, ["plain"]), seed=st.integers(0, 2**32 - 1))
def test_turning_the_gradient_turns_the_direction(ref: ModuleType, g: Any, seed: int) -> None:
    rng = np.random.default_rng(seed)
    q, r = rotation(rng, g.shape[0]), rotation(rng, g.shape[1])
    close(direction(ref, (q @ g @ r).astype(f32)), q @ direction(ref, g) @ r, 1e-3)


def test_rank_never_grows(ref: ModuleType) -> None:
    rng = np.random.default_rng(1)
    g = (rng.standard_normal((12, 2)) @ rng.standard_normal((2, 9))).astype(f32)
    s = np.linalg.svd(direction(ref, g), compute_uv=False)
    assert (s > 0.5).sum() == 2 and s[2] < 1e-4


@pytest.mark.parametrize("eps_at", ["floor", "added"])
def test_no_gradient_moves_nothing(ref: ModuleType, eps_at: str) -> None:
    p = np.ones((3, 4), f32)
    same_bits(follow(ref.Optimizer("muon", eps_at=eps_at), p, [0 * p])[0], p, "p")


def test_eps_is_a_floor_or_is_added(ref: ModuleType) -> None:
    """|Z| = 3 eps: X before any step is Z / |Z|, or 3/4 of it; below the floor, Z / eps."""
    g = f32([[3e-7, 0]])
    np.testing.assert_allclose(direction(ref, g, ns_steps=0), [[1, 0]], rtol=1e-6)
    np.testing.assert_allclose(direction(ref, g, ns_steps=0, eps_at="added"), [[0.75, 0]], rtol=1e-6)
    np.testing.assert_allclose(direction(ref, g / f32(6), ns_steps=0), [[0.5, 0]], rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "adjust_lr", "kappa"),
    [
        ((8, 2), "original", 2.0),
        ((2, 8), "original", 1.0),
        ((16, 2), "match_rms_adamw", 0.8),
        ((2, 16), "match_rms_adamw", 0.8),
    ],
)
def test_the_shape_scales_the_step(ref: ModuleType, shape: Any, adjust_lr: str, kappa: float) -> None:
    """A gradient with one direction, before any Newton-Schulz step: X has norm 1."""
    g = np.zeros(shape, f32)
    g[0, 0] = 5
    opt = ref.Optimizer("muon", lr=0.5, adjust_lr=adjust_lr, ns_steps=0)
    moved, _ = follow(opt, np.zeros(shape, f32), [g])
    np.testing.assert_allclose(np.linalg.norm(moved), 0.5 * kappa, rtol=1e-6)


def test_decay_goes_by_lr_whatever_the_shape(ref: ModuleType) -> None:
    p = np.ones((8, 2), f32)
    (moved,), state = follow(ref.Optimizer("muon", lr=0.5, wd=0.5), [p], [[0 * p]])
    same_bits(moved, f32(0.75) * p, "p")
    assert not state[0]["B"].any()


def test_nesterov_looks_ahead_from_the_new_momentum(ref: ModuleType) -> None:
    """mu = 1/2, g then h: B = g/4 + h/2, Z = h/2 + B/2; the ratio of two directions tells g/8 + 3h/4 from B."""
    g, h = f32([[8, 0]]), f32([[0, 8]])
    for nesterov, want in ((True, [1, 6]), (False, [2, 4])):
        opt = ref.Optimizer("muon", lr=1.0, momentum=0.5, nesterov=nesterov, ns_steps=0)
        p, state = np.zeros((1, 2), f32), opt.init([g])
        (p,), state = opt.step([p], [g], state)
        (q,), state = opt.step([p], [h], state)
        np.testing.assert_allclose(p - q, [np.array(want) / np.hypot(*want)], rtol=1e-6)
        assert state[0]["B"].tolist() == [[2, 4]]


@given(run=runs(steps=4, shapes=SHAPES, low=-3, high=3, kinds=["plain"]))
def test_a_sum_of_gradients_gives_the_direction_of_their_mean(ref: ModuleType, run: Any) -> None:
    """B = mu B + g differs by a factor alone."""
    p, grads = run
    moved, _ = follow(ref.Optimizer("muon", lr=1.0, momentum=0.9, nesterov=False), [p * 0], [[g] for g in grads])
    total, buf = 0, 0
    for g in grads:
        buf = 0.9 * buf + g.astype(float)
        total = total + direction(ref, (buf * 0.1).astype(f32))
    close(-moved[0] / math.sqrt(max(1.0, p.shape[0] / p.shape[1])), total, 1e-3)


@pytest.mark.parametrize(("halves", "part"), [(True, 3e-2), (False, 1e-5)])
@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(64, 32), (24, 96)])
def test_ten_steps_agree_with_torch(
    ref: ModuleType, shape: Any, adjust_lr: str, halves: bool, part: float, monkeypatch: Any
) -> None:
    """Each step from the same weights. In bfloat16, torch's products leave 1 to 2 per cent of the way; in float32, kept
    from halving, a rounding's worth."""
    torch = pytest.importorskip("torch")
    if not halves:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    rng = np.random.default_rng(3)
    p = rng.standard_normal(shape).astype(f32)
    hyper = {"lr": 0.01, "momentum": 0.8, "weight_decay": 0.3}
    weight = torch.nn.Parameter(torch.from_numpy(p.copy()))
    theirs = torch.optim.Muon([weight], adjust_lr_fn=adjust_lr, **hyper)
    opt = ref.Optimizer("muon", adjust_lr=adjust_lr, **hyper)
    state = opt.init([p])
    for _ in range(10):
        g = rng.standard_normal(shape).astype(f32)
        weight.grad = torch.from_numpy(g.copy())
        theirs.step()
        (q,), state = opt.step([p], [g], state)
        want = weight.detach().numpy().copy()
        decayed = p.astype(float) * (1 - 0.01 * 0.3)
        close(q - decayed, want - decayed, part + 2e-4)
        buf = theirs.state[weight]["momentum_buffer"].numpy()
        np.testing.assert_allclose(state[0]["B"], buf, rtol=2e-6, atol=2e-6)
        p = want


def test_the_state_is_the_mean_of_the_gradients(ref: ModuleType) -> None:
    g, h = f32([[8, 4]]), f32([[0, -4]])
    _, state = follow(ref.Optimizer("muon", momentum=0.75), [0 * g], [[g], [h]])
    assert state[0]["B"].tolist() == [[1.5, -0.25]]


REFUSED = [
    ({}, (4,), "ShapeError", r"params\[0\] has shape \(4,\); muon needs two axes"),
    ({}, (2, 3, 4), "ShapeError", r"\(2, 3, 4\); muon needs two axes .flatten a convolution"),
    ({"ns_steps": 100}, (2, 2), "ValueError", "ns_steps must be .*got 100"),
    ({"ns_steps": -1}, (2, 2), "ValueError", "ns_steps must be .*got -1"),
    ({"ns_steps": 2.5}, (2, 2), "ValueError", "ns_steps must be a whole number, got 2.5"),
    ({"momentum": 1.0}, (2, 2), "ValueError", "momentum must be .*got 1.0"),
    ({"adjust_lr": "none"}, (2, 2), "ValueError", "adjust_lr must be one of 'original', 'match_rms_adamw'"),
]


@pytest.mark.parametrize(("hyper", "shape", "error", "words"), REFUSED)
def test_what_cannot_be_is_refused_by_name(
    ref: ModuleType, hyper: dict[str, Any], shape: tuple[int, ...], error: str, words: str
) -> None:
    with pytest.raises(ref.ShapeError if error == "ShapeError" else ValueError, match=words):
        ref.Optimizer("muon", **hyper).init(np.zeros(shape, f32))
