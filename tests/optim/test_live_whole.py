"""Rules of whole tensors and of matrices where a device knows counts, rates, scales and norms: the bits of the CPU.

On a GPU with CUDA graphs in test_graphs.py; here on an emulated device, which tries what leads up to the launches.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.optim import muon, whole_slots
from tests.optim import emulated
from tests.optim.emulated import there
from tests.optim.pairs import gradient, weights

SHAPES = [(64, 80), (5, 300), (3, 40)]
pytestmark = pytest.mark.filterwarnings("ignore:.*bitsandbytes")
LIVE: list[tuple[str, dict[str, Any]]] = [
    ("LAMB", {"lr": 0.013, "weight_decay": 0.06}),
    ("LARS", {"lr": 0.7, "weight_decay": 0.07, "trust_coefficient": 0.02}),
    ("Adafactor", {"lr": 0.02, "relative_step": False, "beta1": 0.8, "weight_decay": 0.2}),
    ("CAME", {"lr": 0.003, "weight_decay": 0.2}),
    ("AdamMini", {"lr": 0.013, "weight_decay": 0.11}),
    ("Muon", {"lr": 0.02, "weight_decay": 0.3, "ns_dtype": "float32", "maximize": True}),
    ("SM3", {"lr": 0.07}),
]
CODED: list[tuple[str, dict[str, Any]]] = [
    ("LAMB8bit", {"lr": 0.013, "codecs": {"m": "bf16"}, "min_8bit_size": 1000}),
    ("CAME8bit", {"lr": 0.003}),
    ("Muon8bit", {"lr": 0.02, "ns_dtype": "float32", "min_8bit_size": 1000}),
    ("SM3", {"lr": 0.07, "codecs": "dynamic8"}),
]
CLIPPED = [("GaLoreAdamW", {"rank": 3, "scale": 0.5}), ("APOLLOAdamW", {"rank": 3})]
NAMES = [name for name, _ in (*LIVE, *CODED, *CLIPPED)]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    emulated.install(monkeypatch)


class Twins:
    """Parameters on the emulated device beside copies on the CPU, each with its optimizer."""

    def __init__(self, name: str, words: dict[str, Any], host: dict[str, Any], shapes: Any = SHAPES) -> None:
        self.host = weights(shapes, torch.float32, "cpu")
        self.there = [there(p, True) for p in self.host]
        make = getattr(rc.optim, name)
        self.opt, self.other = make(self.there, **words), make(self.host, **{**words, **host})
        self.exact = "Muon" not in name  # sums of its norm are in another order there

    def give(self, seed: int, without: tuple[int, ...] = (), scale: float = 1.0) -> None:
        for k, (p, q) in enumerate(zip(self.there, self.host, strict=True)):
            q.grad = None if k in without else gradient(q, 1000 * seed + k)
            p.grad = None if k in without else there(q.grad * scale)

    def same(self) -> None:
        for k, (p, q) in enumerate(zip(self.there, self.host, strict=True)):
            self.alike(p, q, f"weights {k}")
            ours, theirs = self.opt.state.get(p, {}), self.other.state.get(q, {})
            assert ours.keys() == theirs.keys()
            for key, x in theirs.items():
                if key == "step":
                    assert int(ours[key]) == x
                else:
                    self.alike(ours[key], x, f"{key} of {k}")

    def alike(self, x: torch.Tensor, y: torch.Tensor, what: str) -> None:
        if self.exact:
            assert torch.equal(x, y), what
        else:
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize(("name", "words"), [*LIVE, *CODED], ids=[name for name, _ in [*LIVE, *CODED]])
def test_counts_rates_scales_and_norms_on_the_device_change_no_bit(name: str, words: dict[str, Any]) -> None:
    """A rate in a tensor there, a scale that divides, a norm that cuts, a step that is skipped for its Inf, and a
    parameter that misses one: its count parts from the others'."""
    rate, clip = there(torch.tensor(words["lr"], dtype=torch.float64)), {"max_grad_norm": 0.37, "gnorm_scale": 0.3}
    both = Twins(name, {**words, **clip, "lr": rate, "capturable": True}, {"lr": words["lr"], "capturable": False})
    scale, inf = there(torch.tensor(64.0)), there(torch.tensor(0.0))
    for t in range(5):
        bad = t == 3
        with torch.no_grad():
            inf.fill_(float(bad))
            rate.mul_(0.9)
        both.other.param_groups[0]["lr"] = rate.item()
        both.opt.grad_scale, both.opt.found_inf = scale, inf
        both.give(t, (1,) if t == 2 else (), 64.0)
        both.opt.step()
        if not bad:
            both.other.step()
        both.same()
    counts = [both.opt.state[p]["step"] for p in both.there]
    assert [int(c) for c in counts] == [4, 3, 4] and counts[0] is counts[2] and torch.is_tensor(counts[0])
    twin = copy.deepcopy(both.opt)
    both.give(9)
    for p, q in zip(both.there, twin.param_groups[0]["params"], strict=True):
        q.grad = there(p.grad)
    del both.opt.grad_scale, both.opt.found_inf
    for opt in (both.opt, both.other, twin):
        opt.step()
    both.same()
    for p, q in zip(both.there, twin.param_groups[0]["params"], strict=True):
        both.alike(q, p, "a copy")


@pytest.mark.parametrize(("name", "words"), CLIPPED, ids=[name for name, _ in CLIPPED])
def test_clipping_on_the_device_is_that_of_the_host(name: str, words: dict[str, Any]) -> None:
    clip = {"max_grad_norm": 0.37, "gnorm_scale": 0.3}
    both = Twins(name, {**words, **clip}, {})
    for t in range(3):
        both.give(t, (1,) if t == 1 else ())
        both.opt.step()
        both.other.step()
        both.same()


@pytest.mark.parametrize("shapes", [SHAPES, SHAPES[::-1]], ids=["falling", "growing"])
@pytest.mark.parametrize(("name", "words"), [*LIVE, *CODED], ids=[name for name, _ in [*LIVE, *CODED]])
def test_a_capture_takes_what_a_step_before_has_made(
    name: str, words: dict[str, Any], shapes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it matter whether coded states are decoded together or, in the same room, one after the other, larger
    ones behind smaller ones."""
    monkeypatch.setattr(whole_slots, "MOST", 3000)
    monkeypatch.setattr(muon, "ROOM", 1)
    both = Twins(name, {**words, "capturable": True, "max_grad_norm": 0.5}, {"capturable": False}, shapes)
    for t in range(2):
        both.give(t)
        emulated.capture(monkeypatch, t == 1)
        both.opt.step()
        both.other.step()
    held = both.opt._memory.captured
    assert len(held) == 1
    emulated.capture(monkeypatch, False)
    both.same()
    both.opt.load_state_dict(both.opt.state_dict())
    assert both.opt._memory.captured is held


@pytest.mark.parametrize("name", ["LAMB", "Muon"])
def test_a_capture_before_the_first_step_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both = Twins(name, {"capturable": True}, {"capturable": False})
    both.give(0)
    emulated.capture(monkeypatch)
    with pytest.raises(RuntimeError, match="cannot make states: step these parameters once before"):
        both.opt.step()
    assert all(torch.equal(p, q) for p, q in zip(both.there, both.host, strict=True))


REFUSED = [
    ("GaLoreAdamW", {"capturable": True}, "capturable=True: the host counts the steps from one projection to the next"),
    ("APOLLOAdamW", {"capturable": True}, "capturable=True: the host counts the steps from one projection to the next"),
    ("CAME", {"differentiable": True}, "differentiable=True: no kernel records"),
    ("Adafactor", {"codecs": {"R": "q4"}}, r"codecs\['R'\]: a number a row is kept in float32; of adafactor V, m may"),
    ("LAMB", {"codecs": {"p": "bf16_sr"}}, r"codecs\['p'\]: these rules step weights as they are; of lamb m, v may"),
    ("Muon", {"codecs": {"m": "q4"}}, r"codecs\['m'\]: only B may be coded here"),
    ("Muon", {"codecs": "q4", "momentum_dtype": "bfloat16"}, r"momentum_dtype='bfloat16' and codecs\['B'\] = 'q4'"),
    ("SM3", {"max_grad_norm": 0.0}, "max_grad_norm must be finite and above 0, got 0"),
    ("CAME", {"codecs": "dynamic9"}, "no codec 'dynamic9'; there are f32, "),
]


@pytest.mark.parametrize(("name", "words", "message"), REFUSED)
def test_what_cannot_be_is_said(name: str, words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        getattr(rc.optim, name)(weights(SHAPES, torch.float32, "cpu"), **words)


@pytest.mark.parametrize(("name", "words"), [*LIVE, *CODED, *CLIPPED], ids=NAMES)
def test_the_scaler_of_a_host_divides_and_skips(name: str, words: dict[str, Any]) -> None:
    """Whether it leaves that to the step or does it itself."""
    params, scaled = (weights(SHAPES, torch.float32, "cpu") for _ in range(2))
    plain, opt = (getattr(rc.optim, name)(some, **words) for some in (params, scaled))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for t in range(3):
        bad = t == 1
        for p in (*params, *scaled):
            p.grad = None
        scaler.scale(sum((p**2).sum() for p in scaled) * (float("inf") if bad else 1.0)).backward()
        scaler.step(opt)
        scaler.update(8.0)
        if not bad:
            sum((p**2).sum() for p in params).backward()
            plain.step()
    assert opt.state[scaled[0]]["step"] == 2
    assert all(torch.equal(p, q) for p, q in zip(params, scaled, strict=True))
