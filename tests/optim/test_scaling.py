"""Loss scales, found_inf and clipping in the step, on the CPU: the oracle's bits, and torch's behaviour around them."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from tests.bits import same_bits
from tests.optim.pairs import ADAM, Case, exact, give, parameter, snapshot, unchanged, weights

SHAPES = [(64, 80), (9,), (), (0,), (5, 300)]
ADAMW = {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.11}
CASES = [
    Case("AdamW8bit", "adamw", ADAM | {"weight_decay": 0.11}),
    Case("Lion", "lion", {"lr": 0.003, "betas": (0.85, 0.95), "weight_decay": 0.2}),
    Case("SGD", "sgd", {"lr": 0.03, "momentum": 0.85, "weight_decay": 0.07, "nesterov": True}),
]


def oracle(case: Case, params: list[Any], **more: Any) -> tuple[Any, list[np.ndarray], Any]:
    codecs = {"adamw": "dynamic8"}.get(case.rule)
    opt = refopt.Optimizer(case.rule, codecs, min_size=4096, **(case.words | more))
    start = [exact(p) for p in params]
    return opt, start, opt.init(start)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("longest", [0.37, 1e6])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_clipping_has_the_bits_of_the_reference(case: Case, longest: float, maximize: bool) -> None:
    """Over all groups, parameters without gradient left out, after gnorm_scale."""
    params = weights(SHAPES, torch.float32, "cpu")
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    opt = case.make(groups, max_grad_norm=longest, gnorm_scale=0.3, maximize=maximize)
    mirror, p, state = oracle(case, params, max_norm=longest, gscale=0.3, maximize=maximize)
    for t in range(3):
        give(params, t)
        if t == 1:
            params[1].grad = None
        grads = [None if q.grad is None else exact(q.grad) for q in params]
        p, state = mirror.step(p, grads, state)
        opt.step()
        for k, q in enumerate(params):
            same_bits(exact(q), p[k], f"{case}, step {t + 1}, tensor {k}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_half_precision_are_measured_exactly(dtype: torch.dtype) -> None:
    params = weights([(5, 300), (70,)], dtype, "cpu")
    opt = rc.optim.SGD(params, lr=1.0, max_grad_norm=0.25)
    mirror = refopt.Optimizer("sgd", lr=1.0, max_norm=0.25)
    start = [exact(p) for p in params]
    give(params, 3)
    want, _ = mirror.step(start, [exact(p.grad) for p in params], mirror.init(start))
    opt.step()
    for p, q in zip(params, want, strict=True):
        same_bits(exact(p), torch.from_numpy(q).to(dtype).float().numpy(), "p")


def test_gradients_are_left_as_they_are() -> None:
    params = weights(SHAPES, torch.float32, "cpu")
    give(params, 0)
    before = [p.grad.clone() for p in params]
    rc.optim.AdamW(params, max_grad_norm=0.1, gnorm_scale=0.5).step()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def test_clipping_agrees_with_torch() -> None:
    ours, theirs = (weights(SHAPES, torch.float32, "cpu") for _ in range(2))
    mine, other = rc.optim.AdamW(ours, max_grad_norm=0.5, **ADAMW), torch.optim.AdamW(theirs, **ADAMW)
    for t in range(10):
        give(ours, t)
        give(theirs, t)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5)
        mine.step()
        other.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=3e-6, atol=1e-7)


def scaled(opt: Any, params: list[Any], scaler: Any, bad: bool) -> None:
    opt.zero_grad()
    loss = sum((p.float() ** 2).sum() for p in params) * (float("inf") if bad else 1.0)
    scaler.scale(loss).backward()
    scaler.step(opt)
    scaler.update()


@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamW8bit", "Lion8bit"])
def test_a_scaler_divides_and_skips_as_with_torchs_fused_optimizers(name: str) -> None:
    """Beside torch.optim.AdamW(fused=True) where there is one: the same scales, the same skips, the same weights."""
    params = weights([(64, 80), (9,)], torch.float32, "cpu")
    opt, scaler, second = (
        getattr(rc.optim, name)(params, lr=0.01),
        *(torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) for _ in range(2)),
    )
    assert opt._step_supports_amp_scaling
    peer = name.removesuffix("8bit")
    fused = peer in ("SGD", "AdamW")
    theirs = [parameter(p.detach().clone()) for p in params]
    other = getattr(torch.optim, peer)(theirs, lr=0.01, fused=True) if fused else None
    for t in range(8):
        before = [p.detach().clone() for p in params]
        scaled(opt, params, scaler, t in (2, 3))
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True)) == (t in (2, 3))
        if other is not None:
            scaled(other, theirs, second, t in (2, 3))
            assert scaler.get_scale() == second.get_scale()
    assert opt.state[params[0]]["step"] == 6 and not hasattr(opt, "found_inf")
    if name == peer and other is not None:
        for p, q in zip(params, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=3e-6, atol=3e-8)  # weights of size 1 that come to 0


@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_loss_scale_that_is_a_power_of_two_changes_no_bit(clip: float | None) -> None:
    """The norm that is cut is that of the gradients without the scale."""
    (p, r), (q, s) = (weights([(64, 80), (9,)], torch.float32, "cpu") for _ in range(2))
    one, other = (rc.optim.AdamW8bit(ps, lr=0.01, max_grad_norm=clip) for ps in ([p, r], [q, s]))
    for t in range(3):
        give([p, r], t)
        for x, y in ((p, q), (r, s)):
            y.grad = x.grad.clone()
            x.grad *= 4096.0
        one.grad_scale, one.found_inf = torch.tensor(4096.0), torch.tensor(0.0)
        one.step()
        other.step()
        assert torch.equal(p, q) and torch.equal(r, s)


def test_user_unscaling_before_the_step_is_seen() -> None:
    """scaler.unscale_ for clipping by hand: the step then divides no more, and still skips."""
    params = weights([(64, 80)], torch.float32, "cpu")
    opt, scaler = rc.optim.AdamW(params), torch.amp.GradScaler("cpu", init_scale=4.0)
    twin = rc.optim.AdamW([parameter(params[0].detach().clone())])
    scaler.scale((params[0] * 3).sum()).backward()
    scaler.unscale_(opt)
    twin.param_groups[0]["params"][0].grad = params[0].grad.clone()
    assert (params[0].grad == 3).all()
    scaler.step(opt)
    twin.step()
    assert torch.equal(params[0], twin.param_groups[0]["params"][0])


def test_half_precision_weights_step_under_a_scaler_without_unscaling() -> None:
    """torch refuses to unscale float16 gradients in place; the step divides them in float32."""
    params = weights([(64, 80)], torch.float16, "cpu")
    opt, scaler = rc.optim.AdamW(params, lr=0.01), torch.amp.GradScaler("cpu", init_scale=2.0)
    before = params[0].detach().clone()
    scaled(opt, params, scaler, False)
    assert opt.state[params[0]]["step"] == 1 and not torch.equal(params[0], before)
    with pytest.raises(ValueError, match="FP16"):
        scaler.scale(params[0].sum()).backward()
        scaler.unscale_(opt)


def test_a_schedule_keeps_the_scaler_of_the_host() -> None:
    params = weights([(64, 80)], torch.float32, "cpu")
    opt = rc.optim.AdEMAMix(params, t_alpha=10, t_beta3=10)
    assert not opt._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaled(opt, params, scaler, True)
    scaled(opt, params, scaler, False)
    assert opt.state[params[0]]["step"] == 1


BAD: list[tuple[dict[str, Any], Any, str]] = [
    ({"max_grad_norm": 0.0}, ValueError, r"max_grad_norm must be finite and above 0, got 0\.0"),
    ({"max_grad_norm": float("inf")}, ValueError, "max_grad_norm .*inf"),
    ({"max_grad_norm": "1"}, TypeError, "max_grad_norm must be a number, got '1'"),
    ({"gnorm_scale": float("nan")}, ValueError, "gnorm_scale must be finite, got nan"),
    ({"gnorm_scale": None}, TypeError, "gnorm_scale must be a number, got None"),
    ({"differentiable": True}, ValueError, "differentiable=True: no kernel records"),
]


@pytest.mark.parametrize(("words", "error", "message"), BAD)
def test_impossible_scales_are_named(words: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=rf"^AdamW8bit: {message}"):
        rc.optim.AdamW8bit([parameter(torch.ones(3))], **words)


def test_a_schedule_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match=r"^AdEMAMix: t_beta3 schedules .*capturable"):
        rc.optim.AdEMAMix([parameter(torch.ones(3))], t_beta3=5, capturable=True)


def test_groups_cannot_be_clipped_apart() -> None:
    params = weights([(4, 5), (5, 4)], torch.float32, "cpu")
    opt = rc.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "max_grad_norm": 2.0}], max_grad_norm=1.0)
    give(params, 0)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"^AdamW\.step: max_grad_norm is of all groups together, got 1\.0 and 2\.0"):
        opt.step()
    unchanged(opt, before)
    opt.param_groups[1]["max_grad_norm"] = 1.0
    opt.step()


@pytest.mark.parametrize("words", [{"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}])
def test_what_torch_chooses_its_ways_by_changes_no_bit(words: dict[str, Any]) -> None:
    (p,), (q,) = (weights([(64, 80)], torch.float32, "cpu") for _ in range(2))
    one, other = rc.optim.AdamW8bit([p], **words), rc.optim.AdamW8bit([q])
    for opt, x in ((one, p), (other, q)):
        give([x], 1)
        opt.step()
    assert torch.equal(p, q)


def test_capturable_changes_no_bit_on_the_cpu() -> None:
    (p,), (q,) = (weights([(64, 80)], torch.float32, "cpu") for _ in range(2))
    rate = torch.tensor(0.01)
    one, other = rc.optim.AdamW8bit([p], lr=rate, capturable=True), rc.optim.AdamW8bit([q], lr=rate.item())
    for opt, x in ((one, p), (other, q)):
        give([x], 1)
        opt.step()
    assert torch.equal(p, q) and one.state[p]["step"] == 1


def test_a_scheduler_fills_a_rate_in_a_tensor() -> None:
    ours, theirs = (weights([(4, 5)], torch.float32, "cpu") for _ in range(2))
    rates = [torch.tensor(0.1) for _ in range(2)]
    opts = [rc.optim.AdamW(ours, lr=rates[0], capturable=True), torch.optim.AdamW(theirs, lr=rates[1])]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in opts]
    for t in range(4):
        give(ours, t)
        give(theirs, t)
        for opt, schedule in zip(opts, schedules, strict=True):
            opt.step()
            schedule.step()
        assert torch.equal(*(opt.param_groups[0]["lr"] for opt in opts))
    assert opts[0].param_groups[0]["lr"] is rates[0]
    torch.testing.assert_close(ours[0], theirs[0], rtol=3e-6, atol=3e-8)


def test_copies_and_older_pickles_know_these_settings() -> None:
    opt = rc.optim.AdamW8bit(weights([(4, 5)], torch.float32, "cpu"), max_grad_norm=2.0, gnorm_scale=0.5)
    twin = copy.deepcopy(opt)
    assert twin.param_groups[0]["max_grad_norm"] == 2.0
    for name in ("max_grad_norm", "gnorm_scale", "capturable"):
        del twin.param_groups[0][name]
    old = copy.deepcopy(twin)
    give(old.param_groups[0]["params"], 0)
    old.step()
    assert old.param_groups[0]["gnorm_scale"] == 1.0


@pytest.mark.parametrize("name", ["LAMB", "LARS", "Adafactor", "CAME", "AdamMini", "Muon"])
def test_rules_of_whole_tensors_say_what_they_cannot(name: str) -> None:
    make, p = getattr(rc.optim, name), parameter(torch.ones(4, 4))
    make([p], foreach=True, fused=None, capturable=False, differentiable=False, max_grad_norm=None, gnorm_scale=1.0)
    with pytest.raises(ValueError, match=rf"^{name}: differentiable=True: "):
        make([p], differentiable=True)
    with pytest.raises(ValueError, match=rf"^{name}: gnorm_scale must be finite, got inf"):
        make([p], gnorm_scale=float("inf"))
    with pytest.raises(TypeError, match=rf"^{name}: no argument 'rho'; it takes "):
        make([p], rho=1)
