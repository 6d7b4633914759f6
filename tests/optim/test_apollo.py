"""APOLLO as a drop-in: the reference's projections, factors and steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import refopt
from refopt import ShapeError, StateError, rng
from refopt_cuda.optim.apollo import APOLLOAdamW, normals
from tests.optim.pairs import exact, snapshot, unchanged
from tests.optim.test_checkpoints import resume_alike, through_a_file, twins
from tests.optim.test_muon import give, matrices, part

ADAM = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
APOLLO = {"rank": 3, "update_proj_gap": 3, "scale": 2.0}
WORDS = {"lr": 0.02, "beta1": 0.8, "beta2": 0.95, "eps": 1e-6, "wd": 0.1, "rank": 3, "gap": 3, "scale": 2.0}
SHAPES = [(12, 20), (20, 12), (9, 9), (64, 32), (3, 40)]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"scale_type": "tensor"},
    {"scale_front": True},
    {"scale_front": True, "scale_type": "tensor", "proj_type": "left"},
    {"limiter": False},
    {"proj_type": "reverse_std"},
    {"proj_type": "right"},
]


def walk(params: Any, steps: int, **words: Any) -> APOLLOAdamW:
    opt = APOLLOAdamW(params, **(ADAM | APOLLO | words))
    for t in range(steps):
        give(params, t)
        opt.step()
    return opt


@pytest.mark.parametrize("count", [1, 2, 7, 4096])
@pytest.mark.parametrize("place", [(0, 1, 0), (5, 3, 2), (2**63 + 1, 2**40, 9)])
def test_normal_numbers_are_the_references(place: Any, count: int, device: str) -> None:
    from refopt_cuda.random import key, step_word

    seed, step, tensor = place
    got = normals(key(step_word(seed, step), tensor), count, torch.device(device)).cpu().numpy()
    np.testing.assert_allclose(got, rng.normals(rng.key(seed, step, tensor), count), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("words", VARIANTS, ids=str)
def test_every_step_is_the_references(words: dict[str, Any], device: str) -> None:
    """Seven steps, three draws; the reference begins each step where the drop-in stands."""
    params = matrices(SHAPES, device=device)
    opt = APOLLOAdamW([{"params": params[:2]}, {"params": params[2:]}], **ADAM, **APOLLO, **words, seed=4)
    ref = refopt.Optimizer("apollo", **WORDS, **words, seed=4)
    state = ref.init([exact(p) for p in params])
    for t in range(7):
        give(params, t)
        before = [exact(p) for p in params]
        want, state = ref.step(before, [exact(p.grad) for p in params], state)
        opt.step()
        for k, (p, w, b) in enumerate(zip(params, want, before, strict=True)):
            assert part(exact(p) - b, w - b) <= 1e-4, (tuple(p.shape), t)
            entry = opt.state[p]
            assert ("prev" in entry) == words.get("limiter", True)
            for ours, name in (("exp_avg", "m"), ("exp_avg_sq", "v"), ("prev", "prev")):
                if ours in entry:
                    np.testing.assert_allclose(exact(entry[ours]), state[k][name], rtol=2e-4, atol=1e-6)


def test_a_group_without_rank_takes_adamw(device: str) -> None:
    params = matrices([(12, 20), (7,)], device=device)
    opt = APOLLOAdamW(params, **ADAM)
    words = {name: WORDS[name] for name in ("lr", "beta1", "beta2", "eps", "wd")}
    ref = refopt.Optimizer("adamw", eps_at="uncorrected", decay_order="after", **words)
    state = ref.init([exact(p) for p in params])
    for t in range(3):
        give(params, t)
        before = [exact(p) for p in params]
        want, state = ref.step(before, [exact(p.grad) for p in params], state)
        opt.step()
        assert all(part(exact(p) - b, w - b) <= 1e-4 for p, w, b in zip(params, want, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_resuming_changes_no_bit(dtype: torch.dtype, device: str) -> None:
    params = matrices(SHAPES, dtype, device)
    opt = walk(params, 2, seed=7)
    other = APOLLOAdamW(twins(params, device))
    other.load_state_dict(through_a_file(opt.state_dict()))
    resume_alike(opt, other)


ARGUMENTS = [
    ({"rank": 0}, ValueError, "rank .*0"),
    ({"scale": -1.0}, ValueError, "scale .*-1.0"),
    ({"scale_type": "row"}, ValueError, "scale_type must be one of .*'row'"),
    ({"scale_front": 1}, TypeError, "scale_front .*1"),
    ({"proj_type": "full"}, ValueError, "proj_type must be one of .*'full'"),
    ({"proj": "svd"}, ValueError, "proj must be 'random', got 'svd'; GaLoreAdamW"),
    ({"limiter": 2}, TypeError, "limiter .*2"),
    ({"seed": 0.5}, ValueError, "seed must be a whole number, got 0.5"),
]


@pytest.mark.parametrize(("words", "error", "message"), ARGUMENTS)
def test_impossible_arguments_are_named(words: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^APOLLOAdamW: {message}"):
        APOLLOAdamW(matrices([(12, 20)]), **(APOLLO | words))


def test_what_is_no_matrix_is_refused() -> None:
    with pytest.raises(ShapeError, match="apollo needs two axes, others take adamw"):
        APOLLOAdamW(matrices([(7,)]), **APOLLO)


@pytest.mark.parametrize("fault", ["lr", "state"])
def test_an_error_leaves_everything_unchanged(fault: str, device: str) -> None:
    params = matrices([(12, 20), (20, 12)], device=device)
    opt = APOLLOAdamW([{"params": params[:1]}, {"params": params[1:]}], **ADAM, **APOLLO)
    give(params, 0)
    opt.step()
    give(params, 1)
    if fault == "lr":
        opt.param_groups[1]["lr"] = -1.0
    else:
        del opt.state[params[1]]["prev"]
    before = snapshot(opt)
    with pytest.raises((ValueError, StateError), match=r"^APOLLOAdamW\.step: "):
        opt.step()
    unchanged(opt, before)


@pytest.mark.gpu
def test_a_step_waits_for_nothing() -> None:
    params = matrices([(64, 128), (128, 64)], torch.bfloat16, "cuda")
    opt = walk(params, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
