"""Sampled steps are taken again by the reference; a step that is wrong in one bit is seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from refopt_cuda.train import subjects
from refopt_cuda.train.replay import Replay, chosen

SHAPES = [(64, 96), (200,), (600, 130)]
WEIGHTS = ("AdamW8bit:p=bf16_rem16", "Lion8bit:p=bf16_kahan", "AdamW8bit:p=bf16_sr")


def stepped(name: str, spoil: Any = None) -> list[bool]:
    """Three steps; whether each parameter of each step agrees."""
    subject = subjects.parse(name)
    first = [torch.randn(s, generator=torch.Generator().manual_seed(k)) for k, s in enumerate(SHAPES)]
    params = [torch.nn.Parameter(x.to(subject.dtype)) for x in first]
    opt = subject.make(params, 1e-2)
    out = []
    for t in range(3):
        for k, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * t + k)).to(p.dtype)
        replays = [Replay(opt, p) for p in params]
        for r in replays:
            r.before()
        opt.step()
        if spoil is not None and t == 1:
            spoil(opt, params[0])
        out += [r.agrees() for r in replays]
    return out


@pytest.mark.parametrize("name", [*subjects.OURS, "AdamW:v=int8_linear", "AdamW:m=bf16", *WEIGHTS])
def test_every_optimizer_of_ours_agrees(name: str) -> None:
    assert all(stepped(name))


def test_torchs_own_rounding_is_seen() -> None:
    assert not all(stepped("torch.AdamW"))


def next_bit(x: torch.Tensor) -> None:
    with torch.no_grad():
        x.view(-1)[5] = torch.nextafter(x.view(-1)[5], torch.tensor(9.0))


@pytest.mark.parametrize("key", ["p", "v.scales", "m.codes", "p.rem"])
def test_one_wrong_bit_is_seen(key: str) -> None:
    def spoil(opt: Any, p: Any) -> None:
        if key == "p":
            next_bit(p.data)
        elif key == "v.scales":
            next_bit(opt.state[p][key])
        else:
            opt.state[p][key].view(-1)[5] ^= 1

    name = "AdamW8bit:p=bf16_rem16" if key == "p.rem" else "AdamW8bit"
    assert stepped(name, spoil)[3:6] == [False, True, True]


def test_the_first_and_the_last_step_are_among_the_samples() -> None:
    steps = chosen(1000, 64, 0)
    assert len(set(steps)) == 64 and steps[0] == 1 and steps[-1] == 1000
    assert chosen(3, 64, 0).tolist() == [1, 2, 3]
    assert chosen(10, 0, 0).tolist() == []
    assert not np.array_equal(chosen(1000, 64, 1), steps)
