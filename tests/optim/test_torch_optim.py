"""Beside torch.optim: the same numbers after fifty steps, the same contract around them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.optim import dialect
from tests.optim.pairs import ADAM, CASES, HEAVY, Case, give, gradient, parameter, walk, weights

PEERS = [
    ("SGD", {"lr": 0.003, "weight_decay": 0.07}),
    ("SGD", {"lr": 0.003, "momentum": 0.85, "dampening": 0.2, "weight_decay": 0.07}),
    ("SGD", {"lr": 0.003, "momentum": 0.85, "nesterov": True, "weight_decay": 0.07}),
    ("SGD", {"lr": 0.003, "momentum": 0.85, "maximize": True}),
    ("Adam", ADAM | {"lr": 0.003, "weight_decay": 0.06}),
    ("AdamW", ADAM | {"lr": 0.003, "weight_decay": 0.11}),
    ("AdamW", ADAM | {"lr": 0.003, "weight_decay": 0.11, "maximize": True}),
    ("SGD", {}),
    ("Adam", {}),
    ("AdamW", {}),
]
ADAMW = Case("AdamW", "adamw", ADAM | {"weight_decay": 0.11})
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")


def pair(name: str, words: dict[str, Any], device: str, shapes: Any = ((40, 50), (30,), ())) -> tuple[Any, ...]:
    """(our parameters, our optimizer, torch's parameters, torch's optimizer)."""
    generator = torch.Generator().manual_seed(3)
    starts = [1 + 2 * torch.rand(s, generator=generator) for s in shapes]
    ours, theirs = ([parameter(x.clone(), device=device) for x in starts] for _ in range(2))
    return ours, getattr(rc.optim, name)(ours, **words), theirs, getattr(torch.optim, name)(theirs, **words)


def near(ours: Any, theirs: Any) -> None:
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=2e-6, atol=0)


def advance(ours: Any, mine: Any, theirs: Any, other: Any, steps: range) -> None:
    for t in steps:
        give(ours, t)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        mine.step()
        other.step()


@pytest.mark.parametrize(
    ("name", "words"), PEERS, ids=lambda x: str(x) if isinstance(x, str) else "-".join(x) or "defaults"
)
def test_fifty_steps_agree_with_torch(name: str, words: dict[str, Any], device: str) -> None:
    ours, mine, theirs, other = pair(name, words, device)
    advance(ours, mine, theirs, other, range(50))
    near(ours, theirs)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_defaults_are_torchs(name: str) -> None:
    _, mine, _, other = pair(name, {}, "cpu")
    same = {
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "momentum",
        "dampening",
        "nesterov",
        "maximize",
    } & other.defaults.keys()
    assert {k: mine.defaults[k] for k in same} == {k: other.defaults[k] for k in same}


def test_lion_has_the_defaults_of_bitsandbytes() -> None:
    words = rc.optim.Lion8bit([parameter(torch.ones(3))]).defaults
    assert (words["lr"], words["betas"], words["weight_decay"]) == (1e-4, (0.9, 0.99), 0)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Lion"])
@pytest.mark.parametrize("suffix", ["", "8bit"])
def test_positional_arguments_stand_where_torch_and_bitsandbytes_have_them(name: str, suffix: str) -> None:
    p = [parameter(torch.ones(3))]
    betas = (0.8, 0.95)
    given = {
        "SGD": {"lr": 0.1, "momentum": 0.2, "dampening": 0.3, "weight_decay": 0.4, "nesterov": False},
        "Adam": {"lr": 0.1, "betas": betas, "eps": 1e-5, "weight_decay": 0.4},
        "AdamW": {"lr": 0.1, "betas": betas, "eps": 1e-5, "weight_decay": 0.4},
        "Lion": {"lr": 0.1, "betas": betas, "weight_decay": 0.4},
    }[name]
    opt = getattr(rc.optim, name + suffix)(p, *given.values())
    assert {k: opt.defaults[k] for k in given} == given


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_class_is_a_torch_optimizer(case: Case) -> None:
    opt = case.make([parameter(torch.ones(3, 4))])
    assert isinstance(opt, torch.optim.Optimizer) and isinstance(opt, rc.optim.Composed)
    assert type(opt).__name__ in repr(opt) and "lr: " in repr(opt)


def test_groups_have_hyper_parameters_of_their_own(device: str) -> None:
    params = weights([(64, 80), (80, 64), (10,)], torch.float32, device)
    opt = ADAMW.make([{"params": params[:1]}, {"params": params[1:2], "lr": 0.5, "betas": (0.7, 0.8)}])
    opt.add_param_group({"params": params[2:], "weight_decay": 0.0, "maximize": True})
    alone = [ADAMW.make([parameter(params[0].detach().clone(), device=device)])]
    alone += [ADAMW.make([parameter(params[1].detach().clone(), device=device)], lr=0.5, betas=(0.7, 0.8))]
    alone += [ADAMW.make([parameter(params[2].detach().clone(), device=device)], weight_decay=0.0, maximize=True)]
    for t in range(3):
        give(params, t)
        opt.step()
        for p, one in zip(params, alone, strict=True):
            (q,) = one.param_groups[0]["params"]
            q.grad = p.grad.clone()
            one.step()
            assert torch.equal(p, q)


def test_a_group_may_keep_one_state_otherwise(device: str) -> None:
    """The other states stay as the class has them."""
    one, other = weights([(64, 80), (64, 80)], torch.float32, device)
    opt = rc.optim.AdamW8bit([{"params": [one]}, {"params": [other], "codecs": {"m": "f32"}}])
    give([one, other], 0)
    opt.step()
    assert set(opt.state[one]) == {"step", "m.codes", "m.scales", "v.codes", "v.scales"}
    assert set(opt.state[other]) == {"step", "exp_avg", "v.codes", "v.scales"}


def test_thirty_groups(device: str) -> None:
    params = weights([(8, 16)] * 30, torch.float32, device)
    opt = ADAMW.make([{"params": [p], "lr": 0.01 * (k + 1)} for k, p in enumerate(params)])
    again = [parameter(p.detach().clone(), device=device) for p in params]
    give(params, 0)
    opt.step()
    for k, (p, q) in enumerate(zip(params, again, strict=True)):
        q.grad = p.grad
        ADAMW.make([q], lr=0.01 * (k + 1)).step()
        assert torch.equal(p, q)


def test_states_are_made_in_the_first_step_with_a_gradient() -> None:
    params = weights([(64, 80), (4,)], torch.float32, "cpu")
    opt = ADAMW.make(params)
    assert len(opt.state) == 0
    opt.step()
    assert len(opt.state) == 0
    params[0].grad = gradient(params[0], 0)
    opt.step()
    assert list(opt.state) == [params[0]]


def test_a_closure_is_called_once_with_gradients_on(device: str) -> None:
    (p,) = weights([(64, 80)], torch.float32, device)
    opt, calls = ADAMW.make([p]), []

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    before = (p.detach() ** 2).sum()
    assert torch.equal(opt.step(closure), before) and len(calls) == 1
    assert (p.detach() ** 2).sum() < before


def test_zero_grad_both_ways() -> None:
    (p,) = weights([(4, 5)], torch.float32, "cpu")
    opt = ADAMW.make([p])
    give([p], 0)
    opt.zero_grad(set_to_none=False)
    assert (p.grad == 0).all()
    opt.zero_grad()
    assert p.grad is None


def test_step_hooks_see_every_step_and_the_profiler_its_name() -> None:
    (p,) = weights([(4, 5)], torch.float32, "cpu")
    opt, seen = rc.optim.AdamW8bit([p]), []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    give([p], 0)
    with torch.profiler.profile() as profile:
        opt.step()
    assert seen == ["before", "after"]
    assert "Optimizer.step#AdamW8bit.step" in {event.key for event in profile.key_averages()}


SCHEDULES = {
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=12),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.001, 0.02, step_size_up=3),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "words"), [("AdamW", ADAM), ("SGD", HEAVY)], ids=["AdamW", "SGD"])
def test_schedulers_steer_rate_and_momentum(name: str, words: dict[str, Any], schedule: str, device: str) -> None:
    ours, mine, theirs, other = pair(name, words, device)
    one, two = SCHEDULES[schedule](mine), SCHEDULES[schedule](other)
    for t in range(12):
        advance(ours, mine, theirs, other, range(t, t + 1))
        if t < 11:
            one.step()
            two.step()
        assert mine.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    near(ours, theirs)


def test_momentum_that_is_switched_on_later_begins_as_torchs_does(device: str) -> None:
    ours, mine, theirs, other = pair("SGD", {"lr": 0.01, "dampening": 0.2}, device)
    advance(ours, mine, theirs, other, range(3))
    for opt in (mine, other):
        opt.param_groups[0]["momentum"] = 0.9
    advance(ours, mine, theirs, other, range(3, 8))
    near(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_learning_rate_may_be_a_tensor(dtype: torch.dtype, device: str) -> None:
    """Read in each step, so that a change in place counts."""
    (p,), (q,) = (weights([(64, 80)], torch.float32, device) for _ in range(2))
    rate = torch.tensor(0.01, dtype=dtype)
    one, other = ADAMW.make([p], lr=rate), ADAMW.make([q], lr=rate.item())
    for t in range(3):
        give([p], t)
        q.grad = p.grad
        one.step()
        other.step()
        assert torch.equal(p, q)
        rate.mul_(0.5)
        other.param_groups[0]["lr"] = rate.item()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_more_is_said_where_the_dialect_was_told(case: Case) -> None:
    dialect.TOLD.update(("adam", "sgd", "rmsprop"))
    p = weights([(64, 80)], torch.float32, "cpu")
    opt = case.make(p)
    give(p, 0)
    opt.step()
    opt.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_copies_go_on_with_the_same_bits_apart(case: Case, way: Any) -> None:
    params = weights([(64, 80), (9,)], torch.bfloat16, "cpu")
    opt = walk(case, params, 2)
    other = way(opt)
    twins = other.param_groups[0]["params"]
    for p, q in zip(params, twins, strict=True):
        assert p is not q and torch.equal(p, q)
    give(params, 7)
    opt.step()
    assert not any(torch.equal(p, q) for p, q in zip(params, twins, strict=True))
    give(twins, 7)
    other.step()
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)


def test_the_gradient_scaler_skips_a_step_with_inf(device: str) -> None:
    (p,) = weights([(64, 80)], torch.float32, device)
    opt, scaler = ADAMW.make([p]), torch.amp.GradScaler(device, init_scale=8.0)
    before = p.detach().clone()
    for bad in (True, False):
        opt.zero_grad()
        scaler.scale((p * (float("inf") if bad else 1.0)).sum()).backward()
        scaler.step(opt)
        scaler.update()
        assert torch.equal(p, before) == bad
    assert opt.state[p]["step"] == 1


@pytest.mark.parametrize("form", ["disjoint views", "same memory"])
def test_parameters_of_one_storage(form: str, device: str) -> None:
    """Views apart from one another are stepped; memory that two parameters share is refused or stepped one by one."""
    flat = torch.linspace(1, 2, 2 * 64 * 80, device=device)
    second = flat[64 * 80 :] if form == "disjoint views" else flat[: 64 * 80]
    params = [torch.nn.Parameter(flat[: 64 * 80].view(64, 80)), torch.nn.Parameter(second.view(64, 80))]
    copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
    give(params, 0)
    try:
        ADAMW.make(params).step()
    except ValueError as error:
        assert form == "same memory" and "memory" in str(error)
        return
    for k, (p, q) in enumerate(zip(params, copies, strict=True)):
        if form == "same memory" and k:
            q.data = copies[0].data
        q.grad = p.grad
        ADAMW.make([q]).step()
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))
