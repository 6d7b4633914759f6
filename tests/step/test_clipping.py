"""Clipping by the norm over all gradients: the factor, what it multiplies, and what is refused."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from tests.bits import same_bits, same_state
from tests.strategies import f32, log_uniform

SHAPES = [(3, 300), (700,), (), (0,), (2, 3)]
HYPER = {"lr": 0.013, "beta1": 0.8, "beta2": 0.97, "wd": 0.1}


def numbers(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [log_uniform(rng, s, -2, 1) for s in SHAPES]


def norm_of(ref: ModuleType, grads: list[np.ndarray]) -> float:
    """Written out: float64 sums of each tensor, added in order."""
    squared = 0.0
    for g in grads:
        squared += ref.reduce.total(g.astype(np.float64) ** 2) if g.size else 0.0
    return float(np.sqrt(squared))


@pytest.mark.parametrize("gscale", [1.0, 0.3])
@pytest.mark.parametrize("share", [0.1, 0.45, 2.0])
@pytest.mark.parametrize("maximize", [False, True])
def test_a_clipped_step_is_the_step_of_scaled_gradients(
    ref: ModuleType, share: float, gscale: float, maximize: bool
) -> None:
    """One factor, rounded once, whether or not it cuts; 0.3: the loss scale's inverse and the cut are one product."""
    p, grads = numbers(0), numbers(1)
    longest = gscale * norm_of(ref, grads) * share
    cut = longest / (gscale * norm_of(ref, grads) + 1e-6)
    opt = ref.Optimizer("adamw", max_norm=longest, gscale=gscale, maximize=maximize, **HYPER)
    plain = ref.Optimizer("adamw", gscale=gscale * min(1.0, cut), maximize=maximize, **HYPER)
    got, want = opt.step(p, grads, opt.init(p)), plain.step(p, grads, plain.init(p))
    for k, shape in enumerate(SHAPES):
        same_bits(got[0][k], want[0][k], str(shape))
        same_state(got[1][k], want[1][k])


def test_clipping_agrees_with_torch(ref: ModuleType) -> None:
    torch = pytest.importorskip("torch")
    p, grads = numbers(0), numbers(1)
    theirs = [torch.nn.Parameter(torch.from_numpy(x.copy())) for x in p]
    for q, g in zip(theirs, grads, strict=True):
        q.grad = torch.from_numpy(g.copy())
    torch.nn.utils.clip_grad_norm_(theirs, 1.5)
    torch.optim.SGD(theirs, lr=1.0).step()
    opt = ref.Optimizer("sgd", max_norm=1.5, lr=1.0)
    ours, _ = opt.step(p, grads, opt.init(p))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-6, atol=1e-6)


def test_a_gradient_that_is_skipped_is_not_measured(ref: ModuleType) -> None:
    p, grads = numbers(0), numbers(1)
    given = [None if k == 0 else g for k, g in enumerate(grads)]
    opt, rest = (ref.Optimizer("lion", max_norm=0.5, lr=0.1) for _ in range(2))
    got, _ = opt.step(p, given, opt.init(p))
    want, _ = rest.step(p[1:], grads[1:], rest.init(p[1:]))
    for a, b in zip(got[1:], want, strict=True):
        same_bits(a, b, "p")
    same_bits(got[0], p[0], "p[0]")


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_a_norm_that_is_not_finite_leaves_no_weight_finite_by_chance(ref: ModuleType, bad: float) -> None:
    """Inf cuts every other gradient to 0, as torch.nn.utils.clip_grad_norm_ does; NaN makes all of them NaN."""
    p = [np.ones(3, f32), np.ones(2, f32)]
    opt = ref.Optimizer("sgd", max_norm=1.0, lr=1.0)
    (one, other), _ = opt.step(p, [f32([bad, 1, 1]), f32([1, 1])], opt.init(p))
    assert np.isnan(one[0]) and (np.isnan(other).all() if np.isnan(bad) else (other == 1).all())


@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_clip_as_one(ref: ModuleType, ranks: int) -> None:
    p, grads = numbers(0), numbers(1)
    opt = ref.Optimizer("adamw", "dynamic8", max_norm=0.7, **HYPER)
    parts = ref.Partition(opt, p, ranks)
    shards, (want, _) = parts.scatter(opt.init(p)), opt.step(p, grads, opt.init(p))
    got, _ = parts.step(p, grads, shards)
    for a, b in zip(got, want, strict=True):
        same_bits(a, b, "p")
    mine = [x[0] for x in (parts.split("params", p), parts.split("grads", grads))]
    with pytest.raises(ValueError, match="max_norm is of the gradients of all ranks"):
        parts.step_rank(0, *mine, shards[0])


def test_a_traced_step_clips_as_well(ref: ModuleType) -> None:
    p, grads = numbers(0), numbers(1)
    opt = ref.Optimizer("adamw", max_norm=0.7, **HYPER)
    run, want = ref.trace(opt, p, grads, opt.init(p)), opt.step(p, grads, opt.init(p))[0]
    traced: list[np.ndarray] = []

    def follow():
        traced.extend((yield from run)[0])

    assert len(list(follow())) > len(SHAPES)
    for a, b in zip(traced, want, strict=True):
        same_bits(a, b, "p")


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_norm_that_cannot_be_kept_is_refused(ref: ModuleType, value: float) -> None:
    with pytest.raises(ValueError, match=r"^Optimizer: max_norm must be finite and above 0, got"):
        ref.Optimizer("adamw", max_norm=value)
