"""`SM3` against the reference, bit for bit."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt.spec import StateError

SHAPES = [(), (7,), (0,), (12, 20), (32, 64), (3, 4, 5), (1, 9), (2, 3, 4, 5)]
CASES: list[dict[str, Any]] = [
    {"lr": 0.07},
    {"lr": 0.07, "momentum": 0.0, "eps": 1e-8},
    {"lr": 0.07, "momentum": 0.85, "eps": 1e-30, "variant": "I"},
]


def params_of(dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    out = [torch.nn.Parameter(torch.randn(s).to(dtype).to(device)) for s in SHAPES]
    return [*out, torch.nn.Parameter(torch.randn(20, 12).to(dtype).to(device).t())]


def give(params: list[torch.nn.Parameter], t: int) -> None:
    rng = np.random.default_rng(t)
    for p in params:
        x = rng.standard_normal(p.shape) * 10 ** rng.uniform(-6, 3, p.shape) * (rng.random(p.shape) > 0.3)
        p.grad = torch.tensor(x, dtype=p.dtype, device=p.device).view(p.shape)


def exact(x: torch.Tensor) -> np.ndarray:
    return x.detach().cpu().float().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("words", CASES, ids=str)
def test_every_step_has_the_references_bits(words: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    params = params_of(dtype, device)
    opt, ref = rc.optim.SM3(params, **words), refopt.Optimizer("sm3", **words)
    state = ref.init([exact(p) for p in params])
    for t in range(5):
        give(params, t)
        want, state = ref.step([exact(p) for p in params], [exact(p.grad) for p in params], state)
        opt.step()
        for p, w, s in zip(params, want, state, strict=True):
            assert np.array_equal(exact(p), exact(torch.tensor(w).to(dtype))), (t, tuple(p.shape))
            if p.numel():
                assert np.array_equal(exact(opt.state[p]["mu"]), s["mu"]), (t, tuple(p.shape))


def test_what_is_not_finite_reaches_its_row_and_its_column(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(4, 5, device=device))
    opt = rc.optim.SM3([p])
    p.grad = torch.ones_like(p)
    p.grad[1, 2] = float("nan")
    opt.step(), opt.step()
    covered = torch.zeros(4, 5, dtype=torch.bool)
    covered[1], covered[:, 2] = True, True
    assert torch.equal(p.isnan().cpu(), covered)


def test_resuming_changes_no_bit(device: str) -> None:
    params = params_of(torch.float32, device)
    opt = rc.optim.SM3(params)
    give(params, 0)
    opt.step()
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    again = rc.optim.SM3(others)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    give(params, 1), give(others, 1)
    opt.step(), again.step()
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"lr": -1.0}, "SM3: lr must be"),
        ({"momentum": 1.0}, "SM3: momentum must be"),
        ({"variant": "III"}, "SM3: variant must be"),
    ],
)
def test_impossible_arguments_are_named(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rc.optim.SM3([torch.nn.Parameter(torch.ones(2))], **words)


def test_the_state_of_another_momentum_is_refused() -> None:
    params = params_of(torch.float32, "cpu")
    opt = rc.optim.SM3(params, momentum=0.0)
    give(params, 0)
    opt.step()
    with pytest.raises(StateError, match="momentum_buffer"):
        saved = opt.state_dict()
        saved["param_groups"][0]["momentum"] = 0.9
        rc.optim.SM3(params).load_state_dict(saved)
