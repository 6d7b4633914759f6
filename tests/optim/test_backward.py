"""Steps within the backward pass, beside a step after it: the same bits, and what cannot be is said."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import refopt_cuda as rc


def model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 80), torch.nn.Tanh(), torch.nn.Linear(80, 64, bias=False)).to(dtype)


def loss(net: Any, seed: int) -> torch.Tensor:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
    p = next(net.parameters())
    return (net(x.to(p.device, p.dtype)).float() ** 2).mean()


@pytest.mark.parametrize(
    ("name", "dtype", "words"),
    [
        ("AdamW8bit", torch.float32, {"lr": 0.01}),
        ("AdamW8bit", torch.bfloat16, {"lr": 0.01, "codecs": {"p": "bf16_sr"}, "seed": 3}),
        ("SGD", torch.float32, {"lr": 0.1, "momentum": 0.9}),
        ("SM3", torch.bfloat16, {"lr": 0.1, "codecs": "dynamic8", "gnorm_scale": 0.5}),
    ],
)
def test_steps_in_backward_have_the_bits_of_steps_after_it(
    name: str, dtype: torch.dtype, words: Any, device: str
) -> None:
    """Random bits go by the parameter's number among all, not by that in its own optimizer."""
    one, other = model(dtype).to(device), model(dtype).to(device)
    cls = getattr(rc.optim, name)
    stepper, opt = rc.optim.in_backward(one, lambda ps: cls(ps, **words)), cls(other.parameters(), **words)
    for t in range(3):
        loss(one, t).backward()
        assert all(p.grad is None for p in one.parameters())
        opt.zero_grad()
        loss(other, t).backward()
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    assert len(stepper.param_groups) == len(stepper.handles) == 3


@pytest.mark.parametrize(
    ("name", "words"),
    [("APOLLOAdamW", {"rank": 3}), ("Muon", {"ns_dtype": "float32"}), ("CAME", {"gnorm_scale": 0.5})],
)
def test_matrices_are_stepped_in_backward_as_after_it(name: str, words: dict[str, Any], device: str) -> None:
    """APOLLO's projections go by the parameter's number among all."""
    cls, sides = getattr(rc.optim, name), [[torch.nn.Parameter(p.detach().clone()) for p in two()] for _ in range(2)]
    sides = [[torch.nn.Parameter(p.to(device)) for p in side] for side in sides]
    rc.optim.in_backward(sides[0], lambda ps: cls(ps, **words))
    opt = cls(sides[1], **words)
    for t in range(2):
        for side in sides:
            sum(((t + 1) * p**3).sum() for p in side).backward()
        opt.step()
        opt.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(*sides, strict=True))
    with pytest.raises(ValueError, match=r"in_backward: max_grad_norm=1\.0: the norm over all gradients"):
        rc.optim.in_backward(two(), lambda ps: cls(ps, **words, max_grad_norm=1.0))


def two() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((12, 20), (16, 40))]


def test_accumulation_is_deferred_and_the_next_pass_takes_it_along() -> None:
    one, other = model(), model()
    stepper = rc.optim.in_backward(one, lambda ps: rc.optim.AdamW(ps))
    opt = rc.optim.AdamW(other.parameters())
    before = [p.detach().clone() for p in one.parameters()]
    with stepper.accumulate():
        loss(one, 0).backward()
        loss(one, 1).backward()
    assert all(torch.equal(p, b) and p.grad is not None for p, b in zip(one.parameters(), before, strict=True))
    loss(one, 2).backward()
    for t in range(3):
        loss(other, t).backward()
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    with stepper.accumulate():
        loss(one, 0).backward()
    stepper.zero_grad()
    assert all(p.grad is None for p in one.parameters())


def test_states_are_saved_and_loaded_in_order() -> None:
    one = model()
    stepper = rc.optim.in_backward(one, lambda ps: rc.optim.AdamW8bit(ps))
    loss(one, 0).backward()
    stepper.remove()
    other = copy.deepcopy(one)
    new = rc.optim.in_backward(other, lambda ps: rc.optim.AdamW8bit(ps))
    new.load_state_dict(stepper.state_dict())
    again = rc.optim.in_backward(one, lambda ps: rc.optim.AdamW8bit(ps))
    again.load_state_dict(stepper.state_dict())
    for net in (one, other):
        loss(net, 1).backward()
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="2 states for 3 parameters"):
        new.load_state_dict(stepper.state_dict()[:2])


def test_what_cannot_be_is_said() -> None:
    net = model()
    with pytest.raises(ValueError, match=r"^in_backward: max_grad_norm=1\.0: the norm over all gradients is not known"):
        rc.optim.in_backward(net, lambda ps: rc.optim.AdamW8bit(ps, max_grad_norm=1.0))
    with pytest.raises(ValueError, match=r"^in_backward: make must return an optimizer of the one parameter"):
        rc.optim.in_backward(net, lambda ps: rc.optim.AdamW8bit(net.parameters()))
    stepper = rc.optim.in_backward(net, lambda ps: rc.optim.AdamW8bit(ps))
    with pytest.raises(ValueError, match=r"^in_backward: parameter 0 is already stepped in backward"):
        rc.optim.in_backward(net, lambda ps: rc.optim.AdamW8bit(ps))
    with pytest.raises(RuntimeError, match=r"^InBackward\.step: parameters are stepped by loss\.backward"):
        stepper.step()
    stepper.remove()
    before = [p.detach().clone() for p in net.parameters()]
    loss(net, 0).backward()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_a_scaler_is_refused_loudly() -> None:
    net, scaler = model(), torch.amp.GradScaler("cpu", init_scale=8.0)
    stepper: Any = rc.optim.in_backward(net, lambda ps: rc.optim.SGD(ps, lr=0.1))
    scaler.scale(loss(net, 0)).backward()
    with pytest.raises(RuntimeError, match=r"^InBackward\.step: torch\.amp\.GradScaler scaled the loss, and"):
        scaler.step(stepper)
