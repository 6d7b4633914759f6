"""Steps whose counts, rates and scales a device keeps, beside steps whose counts the host keeps: the same bits.

On a GPU with CUDA graphs in test_graphs.py; here on an emulated device, which tries what leads up to the launches.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from tests.optim import emulated
from tests.optim.emulated import Launch, there
from tests.optim.pairs import gradient, weights

SHAPES = [(64, 80), (9,), (), (0,), (5, 300)]
WORDS = {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.11}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)


class Twins:
    """Parameters on the emulated device beside copies on the CPU, each with its optimizer."""

    def __init__(self, name: str = "AdamW8bit", shapes: Any = SHAPES, host: Any = None, **words: Any) -> None:
        self.host = weights(shapes, torch.float32, "cpu")
        self.there = [there(p, True) for p in self.host]
        given = WORDS if name.startswith("AdamW") else {"lr": 0.03}
        self.opt = getattr(rc.optim, name)(self.there, **(given | words))
        self.other = getattr(rc.optim, name)(self.host, **(given | (host or {})))

    def give(self, seed: int, without: tuple[int, ...] = (), scale: float = 1.0) -> None:
        for k, (p, q) in enumerate(zip(self.there, self.host, strict=True)):
            q.grad = None if k in without else gradient(q, 1000 * seed + k)
            p.grad = None if k in without else there(q.grad * scale)

    def same(self, steps: Any = None) -> None:
        for k, (p, q) in enumerate(zip(self.there, self.host, strict=True)):
            assert torch.equal(p, q), f"weights {k}"
            ours, theirs = self.opt.state.get(p, {}), self.other.state.get(q, {})
            assert ours.keys() == theirs.keys()
            for key, x in theirs.items():
                assert torch.equal(ours[key], x) if torch.is_tensor(x) else int(ours[key]) == x, f"{key} of {k}"
            if steps is not None:
                assert theirs["step"] == steps[k]


@pytest.mark.parametrize("name", ["AdamW8bit", "SGD", "Lion", "AdEMAMix"])
def test_counts_on_the_device_change_no_bit(name: str) -> None:
    """A rate in a tensor, parameters that miss steps: their counts part from the others', and stay apart."""
    rate = torch.tensor(0.02)
    both = Twins(name, capturable=True, lr=rate, host={"lr": rate})
    for t in range(6):
        both.give(t, {2: (0,), 3: (0, 4)}.get(t, ()))
        rate.mul_(0.9)
        both.opt.step()
        both.other.step()
        both.same()
    counts = [both.opt.state[p]["step"] for p in both.there]
    assert [int(c) for c in counts] == [4, 6, 6, 6, 5]
    assert counts[1] is counts[2] is counts[3] and counts[0] is not counts[1]
    assert all(c.dtype == torch.int64 for c in counts)


def test_a_rate_on_the_device_is_read_there() -> None:
    rate = there(torch.tensor(0.02, dtype=torch.float64))
    both = Twins(capturable=True, lr=rate, host={"lr": 0.02})
    for t in range(3):
        both.give(t)
        both.opt.step()
        both.other.step()
        both.same()
        with torch.no_grad():
            rate.mul_(0.5)
        both.other.param_groups[0]["lr"] = rate.item()


def test_found_inf_on_the_device_skips_and_its_scale_divides() -> None:
    """Neither is read by the host; counts stay on the device when the scaler has gone."""
    both = Twins()
    scale, inf = there(torch.tensor(1024.0)), there(torch.tensor(0.0))
    for t in range(7):
        bad = t in (2, 3)
        with torch.no_grad():
            inf.fill_(float(bad))
        if t < 5:
            both.opt.grad_scale, both.opt.found_inf = scale, inf
        both.give(t, scale=1024.0 if t < 5 else 1.0)
        both.opt.step()
        if t < 5:
            del both.opt.grad_scale, both.opt.found_inf
        if not bad:
            both.other.step()
        both.same()
    assert torch.is_tensor(both.opt.state[both.there[0]]["step"])
    assert [launch.binds for launch in Launch.made] == [1, 1]


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_clipping_on_the_device_has_the_bits_of_the_host(capturable: bool, scaled: bool) -> None:
    """The norm of gradients without their scale; one that is missing is not measured."""
    clip = {"max_grad_norm": 0.37, "gnorm_scale": 0.3, "maximize": True}
    both = Twins(capturable=capturable, host=clip, **clip)
    for t in range(5):
        both.give(t, (1,) if t == 2 else (), 64.0 if scaled else 1.0)
        if scaled:
            both.opt.grad_scale = there(torch.tensor(64.0))
        both.opt.step()
        both.other.step()
        both.same()
    counts = {type(both.opt.state[p]["step"]) for p in both.there}
    assert counts == ({torch.Tensor} if capturable or scaled else {int})


@pytest.mark.parametrize(
    "words", [{}, {"capturable": True}, {"max_grad_norm": 0.5}, {"capturable": True, "max_grad_norm": 0.5}]
)
def test_the_same_step_again_prepares_nothing(words: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from refopt_cuda.optim import run

    both = Twins(host={k: v for k, v in words.items() if k != "capturable"}, **words)
    for t in range(4):
        if t == 1:
            monkeypatch.setattr(run.Plan, "prepare", None)
        both.give(t)
        both.opt.step()
    monkeypatch.undo()
    for t in range(4):
        both.give(t)
        both.other.step()
    both.same()


def test_more_counts_than_a_launch_has_rows() -> None:
    both = Twins("AdamW", [(3, 5)] * 11, capturable=True)
    for t in range(12):
        both.give(t, tuple(range(t + 1, 11)))
        both.opt.step()
        both.other.step()
    both.same(steps=range(12, 1, -1))
    assert len({id(both.opt.state[p]["step"]) for p in both.there}) == 11


def test_counts_are_saved_loaded_and_copied_as_numbers() -> None:
    both = Twins(capturable=True)
    both.give(0)
    both.opt.step()
    both.other.step()
    file = io.BytesIO()
    torch.save(both.opt.state_dict(), file)
    file.seek(0)
    new = Twins(capturable=True)
    with torch.no_grad():
        for old, p in zip(both.there, new.there, strict=True):
            p.copy_(old)
    new.opt.load_state_dict(torch.load(file, weights_only=True))
    assert new.opt.state[new.there[0]]["step"] == 1
    twin = copy.deepcopy(both.opt)
    for t in (1, 2):
        both.give(t)
        for p, q, r in zip(new.there, both.host, twin.param_groups[0]["params"], strict=True):
            p.grad, r.grad = there(q.grad), there(q.grad)
        for opt in (both.opt, both.other, new.opt, twin):
            opt.step()
    both.same()
    for p, q, r in zip(new.there, both.host, twin.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q) and torch.equal(r, q)
    assert torch.is_tensor(both.opt.state[both.there[0]]["step"])


def test_a_capture_takes_the_launches_of_a_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Twins(capturable=True, max_grad_norm=0.5, host={"max_grad_norm": 0.5})
    for t in range(2):
        both.give(t)
        emulated.capture(monkeypatch, t == 1)
        both.opt.step()
        both.other.step()
    held = both.opt._memory.captured
    assert len(held) == 1 and held[0][0] and held[0][1]
    emulated.capture(monkeypatch, False)
    both.same()
    both.opt.load_state_dict(both.opt.state_dict())
    assert both.opt._memory.captured is held


@pytest.mark.parametrize("what", ["states", "step counts", "the sums of gradients"])
def test_a_capture_makes_nothing_new(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = {"max_grad_norm": 0.5} if what == "the sums of gradients" else {}
    both = Twins(capturable=True)
    if what != "states":
        both.give(0)
        both.opt.step()
    for name, value in clip.items():
        both.opt.param_groups[0][name] = value
    emulated.capture(monkeypatch)
    both.give(1, (0,) if what == "step counts" else ())
    before = [p.detach().clone() for p in both.there]
    with pytest.raises(RuntimeError, match=f"^step: a CUDA graph .* cannot make {what}: step"):
        both.opt.step()
    assert all(torch.equal(p, b) for p, b in zip(both.there, before, strict=True))


def test_a_capture_of_parameters_on_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    both = Twins()
    both.give(0)
    both.opt.step()
    host = rc.optim.AdamW8bit(both.host, capturable=True)
    host.step()
    emulated.capture(monkeypatch)
    with pytest.raises(RuntimeError, match=r"^AdamW8bit\.step: .*CUDA graph"):
        host.step()


def test_a_schedule_is_refused_where_the_device_computes() -> None:
    both = Twins("AdEMAMix", t_alpha=5, host={"t_alpha": 5})
    both.give(0)
    both.opt.step()
    both.opt.found_inf = there(torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"^AdEMAMix\.step: t_alpha schedules"):
        both.opt.step()


def _replaced(state: Any, p: Any) -> None:
    state[p]["exp_avg"] = state[p]["exp_avg"] * 2


def _moved(state: Any, p: Any) -> None:
    state[p]["exp_avg"].data = state[p]["exp_avg"].data * 2


def _another_entry(state: Any, p: Any) -> None:
    state[p] = {k: x * 2 if k == "exp_avg" else x for k, x in state[p].items()}


def _another_count(state: Any, p: Any) -> None:
    state[p]["step"] = 9


@pytest.mark.parametrize("change", [_replaced, _moved, _another_entry, _another_count])
def test_a_step_in_the_lane_sees_what_was_changed_in_the_state(change: Any) -> None:
    both = Twins("AdamW")
    for t in range(4):
        if t == 3:
            change(both.opt.state, both.there[0]), change(both.other.state, both.host[0])
        both.give(t)
        both.opt.step()
        both.other.step()
        both.same()
        assert t != 2 or all(plan.lane is not None for plan in both.opt._plans.values())
