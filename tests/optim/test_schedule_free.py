"""Schedule-Free AdamW as a class: the reference's bits, both kinds of weights, copies, and what is refused."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt.rules.schedule_free import averaged, live
from refopt.spec import StateError
from tests.bits import same_bits
from tests.optim import emulated
from tests.optim.emulated import there
from tests.optim.pairs import exact, give, gradient, parameter, weights
from tests.optim.test_checkpoints import refused, resume_alike, through_a_file, twins

SHAPES = [(64, 80), (9,), (5, 300), (0,)]
WORDS: dict[str, Any] = {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.06, "r": 0.5}
CODED = [(64, 80), (5, 16, 60), (33, 200)]
RUNS: list[tuple[str, torch.dtype, dict[str, Any]]] = [
    ("f32", torch.float32, {"max_grad_norm": 0.4}),
    ("dynamic8", torch.bfloat16, {"maximize": True, "gnorm_scale": 0.3}),
]
"""Kernels that tests/kernels/test_schedule_free.py compiles as well."""


@pytest.mark.parametrize(("codec", "dtype", "more"), RUNS, ids=["f32", "dynamic8"])
def test_every_step_is_the_references(codec: str, dtype: torch.dtype, more: dict[str, Any], device: str) -> None:
    """Rates that change, a warm-up, and a parameter that misses a step: each carries its own past."""
    params = weights(SHAPES if codec == "f32" else CODED, dtype, device)
    opt = rc.optim.ScheduleFreeAdamW(params, warmup_steps=3, weight_lr_power=1.5, codecs=codec, **WORDS, **more)
    words = {"max_grad_norm": "max_norm", "gnorm_scale": "gscale"}
    theirs = WORDS | {words.get(k, k): v for k, v in more.items()} | {"warmup": 3, "lr_power": 1.5, "min_size": 4096}
    state = refopt.Optimizer("schedule_free", {"v": codec}, **theirs).init([exact(p) for p in params])
    for t, rate in enumerate((0.013, 0.02, 0.007, 0.007)):
        opt.param_groups[0]["lr"] = rate
        give(params, t)
        if t == 1:
            params[2].grad = None
        ref = refopt.Optimizer("schedule_free", {"v": codec}, **{**theirs, "lr": rate})
        grads = [None if p.grad is None else exact(p.grad) for p in params]
        want, state = ref.step([exact(p) for p in params], grads, state)
        opt.step()
        for k, (p, q) in enumerate(zip(params, want, strict=True)):
            same_bits(exact(p), torch.from_numpy(q).to(dtype).float().numpy(), f"step {t + 1}, weights {k}")
    assert [opt.state[p]["step"] for p in params] == [4, 4, 3, 4][: len(params)]
    assert ("v.codes" in opt.state[params[0]]) == (codec != "f32")


def test_weights_to_judge_are_the_average_and_come_back(device: str) -> None:
    params = weights(SHAPES[:2], torch.float32, device)
    opt = rc.optim.ScheduleFreeAdamW(params, **WORDS)
    opt.train()
    for t in range(2):
        give(params, t)
        opt.step()
    bases = [{"z": exact(opt.state[p]["z"])} for p in params]
    want = [averaged(exact(p), base, 0.8) for p, base in zip(params, bases, strict=True)]
    for _ in range(2):
        opt.eval()
        for p, x in zip(params, want, strict=True):
            same_bits(exact(p), x, "the average")
    give(params, 3)
    with pytest.raises(StateError, match=r"^ScheduleFreeAdamW\.step: the weights are those to judge; call train\(\)"):
        opt.step()
    opt.train()
    for p, x, base in zip(params, want, bases, strict=True):
        same_bits(exact(p), live(x, base, 0.8), "the weights to step")
    opt.step()


def test_copies_and_checkpoints_go_on_with_the_same_bits(device: str) -> None:
    params = weights(CODED, torch.bfloat16, device)
    opt = rc.optim.ScheduleFreeAdamW8bit(params, **WORDS)
    for t in range(2):
        give(params, t)
        opt.step()
    for twin in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        resume_alike(copy.deepcopy(opt), twin)
    opt.eval()
    other = rc.optim.ScheduleFreeAdamW8bit(twins(params, device), **WORDS)
    other.load_state_dict(through_a_file(opt.state_dict()))
    opt.train(), other.train()
    resume_alike(opt, other)


def test_what_leads_up_to_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an emulated device: launches are bound once, the bits are the CPU's, clipping is the device's."""
    host = weights(SHAPES, torch.float32, "cpu")
    params = [there(p, True) for p in host]
    other = rc.optim.ScheduleFreeAdamW(host, **WORDS, max_grad_norm=0.4)
    emulated.install(monkeypatch)
    opt = rc.optim.ScheduleFreeAdamW(params, **WORDS, max_grad_norm=0.4)
    for t in range(3):
        for k, (p, q) in enumerate(zip(params, host, strict=True)):
            q.grad = gradient(q, 10 * t + k)
            p.grad = there(q.grad)
        opt.step(), other.step()
        assert all(torch.equal(p, q) for p, q in zip(params, host, strict=True))
    assert [(launch.binds, launch.runs) for launch in emulated.Launch.made] == [(1, 3)]


def test_what_cannot_be_is_said() -> None:
    p = parameter(torch.ones(64, 64))
    make = rc.optim.ScheduleFreeAdamW
    with pytest.raises(ValueError, match=r"^ScheduleFreeAdamW: capturable=True: the host weighs each step by powers"):
        make([p], capturable=True)
    with pytest.raises(ValueError, match=r"^ScheduleFreeAdamW\.add_param_group: ScheduleFreeAdamW cannot be captured"):
        make([{"params": [p], "capturable": True}])
    with pytest.raises(ValueError, match=r"codecs\['z'\]: only v may be coded here"):
        make([p], codecs={"z": "bf16"})
    with pytest.raises(ValueError, match=r"warmup_steps must be a whole number, got 1\.5"):
        make([p], warmup_steps=1.5)
    opt = make([p], betas=(0.0, 0.9))
    give([p], 0)
    opt.step()
    with pytest.raises(ValueError, match=r"^ScheduleFreeAdamW\.eval: betas\[0\] must be > 0, got 0\.0"):
        opt.eval()
    saved = through_a_file(opt.state_dict())
    saved["state"][0]["weight_sum"] = -1.0
    refused(opt, saved, StateError, r"state\[0\]: 'weight_sum' must be a number >= 0, got -1\.0")
