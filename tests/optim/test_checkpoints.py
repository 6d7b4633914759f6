"""Checkpoints: codes stay codes, float32 stays float32, the next step has the same bits, a mismatch is refused."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt import ShapeError, StateError
from tests.optim.pairs import ADAM, CASES, HEAVY, Case, give, parameter, snapshot, unchanged, walk, weights

SHAPES = [(64, 80), (33, 200), (9,), ()]
ADAMW = Case("AdamW", "adamw", ADAM | {"weight_decay": 0.11})
ADAMW8 = ADAMW._replace(name="AdamW8bit")
pytestmark = pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")


def through_a_file(state_dict: dict[str, Any], **options: Any) -> dict[str, Any]:
    """What `torch.load(weights_only=True)` gives back."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


def twins(params: list[Any], device: str = "cpu") -> list[Any]:
    return [parameter(p.detach().clone(), p.dtype, device) for p in params]


def resume_alike(one: Any, other: Any, steps: int = 2) -> None:
    """Assert that both optimizers take the same steps from here, states included."""
    for t in range(100, 100 + steps):
        ours, theirs = (opt.param_groups[0]["params"] for opt in (one, other))
        give(ours, t)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.to(q.device)
        one.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.equal(p.cpu(), q.cpu())
            assert one.state[p].keys() == other.state[q].keys()
            for key, x in one.state[p].items():
                y = other.state[q][key]
                same = x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu()) if torch.is_tensor(x) else x == y
                assert same, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_resuming_changes_no_bit(case: Case, dtype: torch.dtype, device: str) -> None:
    params = weights(SHAPES, dtype, device)
    opt = walk(case, params, 3)
    other = case.make(twins(params, device))
    other.load_state_dict(state_dict=through_a_file(opt.state_dict()))
    resume_alike(opt, other)


def test_states_keep_their_dtypes(device: str) -> None:
    """torch's own load would make float32 states and scales bfloat16, as the weights are."""
    params = weights(SHAPES, torch.bfloat16, device)
    opt = walk(ADAMW8, params, 1)
    other = ADAMW8.make(twins(params, device))
    other.load_state_dict(opt.state_dict())
    state = other.state[other.param_groups[0]["params"][0]]
    assert {k: x.dtype for k, x in state.items() if torch.is_tensor(x)} == {
        "m.codes": torch.uint8,
        "v.codes": torch.uint8,
        "m.scales": torch.float32,
        "v.scales": torch.float32,
    }
    assert other.state[other.param_groups[0]["params"][2]]["exp_avg"].dtype == torch.float32


def test_a_loaded_state_shares_no_memory_with_what_was_loaded(device: str) -> None:
    params = weights(SHAPES, torch.float32, device)
    opt = walk(ADAMW8, params, 1)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    other = ADAMW8.make(twins(params, device))
    other.load_state_dict(saved)
    give(other.param_groups[0]["params"], 5)
    other.step()
    for k, state in saved["state"].items():
        for key, x in state.items():
            assert torch.equal(x, kept["state"][k][key]) if torch.is_tensor(x) else x == kept["state"][k][key]


@pytest.mark.gpu
@pytest.mark.parametrize(("source", "target"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_state_moves_to_the_device_of_its_parameter(source: str, target: str) -> None:
    params = weights(SHAPES, torch.float32, source)
    opt = walk(ADAMW8, params, 2)
    other = ADAMW8.make(twins(params, target))
    other.load_state_dict(through_a_file(opt.state_dict()))
    resume_alike(opt, other)


def test_a_fresh_optimizers_state_loads() -> None:
    one, other = (ADAMW8.make(weights(SHAPES, torch.float32, "cpu")) for _ in range(2))
    other.load_state_dict(one.state_dict())
    resume_alike(one, other)


def test_only_some_parameters_have_a_state() -> None:
    params = weights(SHAPES, torch.float32, "cpu")
    opt = ADAMW8.make(params)
    give(params[:2], 0)
    opt.step()
    other = ADAMW8.make(twins(params))
    other.load_state_dict(through_a_file(opt.state_dict()))
    resume_alike(opt, other)


def test_hyper_parameters_come_with_the_state() -> None:
    params = weights(SHAPES, torch.float32, "cpu")
    opt = walk(ADAMW8, params, 1)
    other = rc.optim.AdamW8bit(twins(params), lr=9.0)
    other.load_state_dict(through_a_file(opt.state_dict()))
    assert {k: other.param_groups[0][k] for k in ADAMW8.words} == ADAMW8.words
    resume_alike(opt, other)


@pytest.mark.parametrize("order", ["load, then schedule", "schedule, then load"])
def test_a_scheduled_run_resumes(order: str) -> None:
    """A schedule that continues asks for the `initial_lr` that the state brings."""

    def schedule(opt: Any, last: int = -1) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 0.5**t, last_epoch=last)

    params = weights(SHAPES, torch.float32, "cpu")
    opt = ADAMW8.make(params)
    rate = schedule(opt)
    for t in range(3):
        give(params, t)
        opt.step()
        rate.step()
    saved, other = through_a_file(opt.state_dict()), ADAMW8.make(twins(params))
    if order == "load, then schedule":
        other.load_state_dict(saved)
        again = schedule(other, last=rate.last_epoch - 1)
    else:
        again = schedule(other)
        again.load_state_dict(rate.state_dict())
        other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == again.get_last_lr()[0]
    resume_alike(opt, other)


def test_hooks_around_state_dicts_are_called(device: str) -> None:
    params = weights(SHAPES[:2], torch.float32, device)
    opt, seen = walk(ADAMW8, params, 1), []
    opt.register_state_dict_pre_hook(lambda o: seen.append("save"))
    opt.register_state_dict_post_hook(lambda o, s: seen.append("saved"))
    other = ADAMW8.make(twins(params, device))

    def rename(o: Any, s: dict[str, Any]) -> dict[str, Any]:
        seen.append("load")
        return {"state": s["state"], "param_groups": [{**g, "lr": 0.5} for g in s["param_groups"]]}

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(
        lambda o: seen.append(("loaded", len(o.state), o.state[params_of(o)[0]]["m.codes"].dtype))
    )
    other.load_state_dict(opt.state_dict())
    assert seen == ["save", "saved", "load", ("loaded", 2, torch.uint8)]
    assert other.param_groups[0]["lr"] == 0.5


def params_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


TORCHS = [
    ("AdamW", ADAM | {"weight_decay": 0.11}),
    ("Adam", ADAM | {"weight_decay": 0.06}),
    ("SGD", HEAVY),
    ("SGD", {"lr": 0.01}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "words"), TORCHS, ids=["AdamW", "Adam", "SGD", "SGD-plain"])
def test_a_state_of_torch_optim_loads(name: str, words: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    """Its keys are ours; what torch kept in bfloat16 is widened."""
    theirs = weights(SHAPES, dtype, device)
    other = getattr(torch.optim, name)(theirs, **words)
    for t in range(3):
        give(theirs, t)
        other.step()
    ours = twins(theirs, device)
    opt = getattr(rc.optim, name)(ours)
    opt.load_state_dict(through_a_file(other.state_dict()))
    assert {k: opt.param_groups[0][k] for k in words} == words
    for p, q in zip(ours, theirs, strict=True):
        for key, x in other.state[q].items():
            if key != "step":
                y = opt.state[p][key]
                assert y.dtype == torch.float32 and torch.equal(x.float(), y)
        assert opt.state.get(p, {"step": 3}).get("step", 3) in (1, 3)
    if dtype == torch.float32:
        give(ours, 9)
        for p, q in zip(ours, theirs, strict=True):
            q.grad = p.grad.clone()
        opt.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=2e-6, atol=1e-8)  # weights may cancel their step


def refused(opt: Any, saved: dict[str, Any], error: type[Exception], message: str) -> None:
    """Assert that the load raises and changes nothing."""
    before, groups = (
        snapshot(opt),
        copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]),
    )
    with pytest.raises(error, match=message):
        opt.load_state_dict(saved)
    unchanged(opt, before)
    assert [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups] == groups


OTHERS = [
    ("rule", "Adam8bit", {}, StateError, "rule.*'adam'.*'adamw'"),
    ("another rule of the same keys", "Adam", {}, StateError, "rule"),
    ("lion", "Lion8bit", {}, StateError, "rule"),
    ("codec", "AdamW", {}, StateError, "codecs.*'f32'.*'dynamic8'"),
    ("one codec", "AdamW8bit", {"codecs": {"v": "int8_linear"}}, StateError, "codecs.*'int8_linear'"),
    ("block", "AdamW8bit", {"block": 128}, StateError, "block.*128.*256"),
    ("min_size", "AdamW8bit", {"min_8bit_size": 6000}, StateError, r"min_size.*6000|m\.codes"),
]


@pytest.mark.parametrize(
    ("what", "name", "more", "error", "message"), OTHERS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_the_state_of_another_optimizer_is_refused(
    what: str, name: str, more: dict[str, Any], error: type[Exception], message: str
) -> None:
    params, theirs = weights(SHAPES, torch.float32, "cpu"), weights(SHAPES, torch.float32, "cpu")
    opt, other = ADAMW8.make(params), getattr(rc.optim, name)(theirs, **more)
    for one, ps in ((opt, params), (other, theirs)):
        give(ps, 0)
        one.step()
    refused(opt, through_a_file(other.state_dict()), error, message)


@pytest.mark.parametrize(
    ("entry", "library"),
    [
        ({"step": 1, "exp_avg": torch.ones(64, 80), "exp_avg_sq": torch.ones(64, 80)}, "torch"),
        ({"step": 1, "state1": torch.ones(64, 80), "qmap1": torch.ones(256)}, "bitsandbytes"),
        ({"step": 1, "exp_avg::quantized": torch.ones(64, 80)}, "flashoptim"),
    ],
)
def test_the_state_of_another_library_is_refused_with_what_takes_it_over(entry: dict[str, Any], library: str) -> None:
    opt = ADAMW8.make(weights([(64, 80)], torch.float32, "cpu"))
    saved = {"state": {0: entry}, "param_groups": [{"params": [0], "lr": 1e-3, "betas": (0.9, 0.999)}]}
    refused(opt, saved, StateError, rf"a state of another library: see refopt_cuda\.convert\.from_{library}$")


@pytest.mark.parametrize("case", [ADAMW, ADAMW8], ids=str)
def test_the_state_of_other_shapes_is_refused(case: Case) -> None:
    """Same number of elements, another shape."""
    opt = walk(case, weights([(64, 80), (9,)], torch.float32, "cpu"), 1)
    other = walk(case, weights([(80, 64), (9,)], torch.float32, "cpu"), 1)
    refused(opt, other.state_dict(), ShapeError, r"\(80, 64\).*\(64, 80\)")


def test_groups_that_do_not_match_are_refused() -> None:
    params = weights(SHAPES, torch.float32, "cpu")
    opt = walk(ADAMW8, params, 1)
    refused(opt, ADAMW8.make(twins(params[:2])).state_dict(), ValueError, "group")
    two = ADAMW8.make([{"params": twins(params[:2])}, {"params": twins(params[2:])}])
    refused(opt, two.state_dict(), ValueError, "group")


@pytest.mark.parametrize("fault", ["scales gone", "codes as floats", "step", "strange key", "lr"])
def test_a_damaged_state_is_refused(fault: str) -> None:
    opt = walk(ADAMW8, weights(SHAPES, torch.float32, "cpu"), 1)
    saved = copy.deepcopy(opt.state_dict())
    entry = saved["state"][1]
    if fault == "scales gone":
        del entry["v.scales"]
    elif fault == "codes as floats":
        entry["m.codes"] = entry["m.codes"].float()
    elif fault == "step":
        entry["step"] = -3
    elif fault == "strange key":
        entry["max_exp_avg_sq"] = torch.zeros(33, 200)
    else:
        saved["param_groups"][0]["lr"] = -1.0
    pattern = {"lr": "lr", "strange key": "max_exp_avg_sq", "step": "step"}.get(fault, r"v\.scales|m\.codes")
    refused(opt, saved, ValueError if fault == "lr" else StateError, pattern)


@pytest.mark.parametrize(
    ("theirs", "words", "ours"),
    [
        ("Adam", {"weight_decay": 0.1}, "AdamW"),
        ("AdamW", {"weight_decay": 0.1}, "Adam"),
        ("AdamW", {}, "AdamW8bit"),
        ("SGD", {"momentum": 0.9}, "AdamW"),
        ("NAdam", {}, "AdamW"),
        ("AdamW", {}, "SGD"),
    ],
)
def test_a_state_of_torch_that_means_something_else_is_refused(theirs: str, words: dict[str, Any], ours: str) -> None:
    """Coupled for decoupled decay, float32 for codes, another rule."""
    params = weights([(64, 80)], torch.float32, "cpu")
    other = getattr(torch.optim, theirs)(params, **words)
    give(params, 0)
    other.step()
    refused(getattr(rc.optim, ours)(twins(params)), other.state_dict(), StateError, "load_state_dict")


def test_amsgrad_of_torch_goes_on_as_amsgrad() -> None:
    params = weights([(64, 80)], torch.float32, "cpu")
    other = torch.optim.AdamW(params, amsgrad=True)
    give(params, 0)
    other.step()
    copies = twins(params)
    opt = rc.optim.AdamW(copies)
    opt.load_state_dict(other.state_dict())
    assert opt.param_groups[0]["amsgrad"] and "max_exp_avg_sq" in opt.state[copies[0]]
    for side in (params, copies):
        give(side, 1)
    other.step()
    opt.step()
    torch.testing.assert_close(copies[0], params[0], rtol=2e-6, atol=1e-7)
