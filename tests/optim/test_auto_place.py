"""`place="auto"`: plans that were computed by hand, the bits of the resident step, and what is measured when."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.optim import splitting
from refopt_cuda.optim.hosting import Hosted
from refopt_cuda.optim.splitting import Load, Need, Rates, Split, split
from tests.optim.pairs import weights
from tests.optim.placed import ADAMW8, alike, model, owned, params_of, step, trained
from tests.optim.test_checkpoints import through_a_file, twins

SHAPES = [(64, 80), (33, 300), (64, 64), (40,)]
"""Of 10,752, 20,328, 8,704 and 320 bytes of states."""
F32 = Need(states=800, p=200, g=200, elements=100)
"""A hundred elements of AdamW with float32 states and bfloat16 weights."""
CODED = Need(states=203, p=200, g=200, elements=100)


def never() -> Rates:
    raise AssertionError("measured without need")


def test_what_fits_stays_and_nothing_is_measured() -> None:
    found = split([F32] * 3, 2400, never)
    assert found.places == ("resident",) * 3 and found.load == Load() and "nothing moves" in str(found)


@pytest.mark.parametrize(
    ("needs", "spare", "rates", "places", "load"),
    [
        # a link of 100 B/s: 8 s to stream one; 4 s of gradient and weights down for the host, and 1 s of work
        ([F32], 0, Rates(100, 100), "h", Load(0, 4)),
        # the host takes 9 s: it streams
        ([F32], 0, Rates(100, 100 / 9), "p", Load(8, 0)),
        # equal: it streams
        ([F32], 0, Rates(100, 100 / 8), "p", Load(8, 0)),
        # 5 s of work each, longer than what comes down
        ([F32] * 3, 0, Rates(100, 20), "hhh", Load(0, 15)),
        # codes: 2.03 s to stream, 4 s down
        ([CODED] * 2, 0, Rates(100, 1e9), "pp", Load(4.06, 0)),
        # the first stays, the last goes to the host and the codes stream; or the codes alone fit
        ([F32, CODED, F32], 803, Rates(100, 100), "rph", Load(2.03, 4)),
        ([F32._replace(states=900), CODED, F32], 803, Rates(100, 100), "hrh", Load(0, 8)),
    ],
)
def test_plans_are_those_that_were_computed_by_hand(
    needs: Any, spare: int, rates: Rates, places: str, load: Load
) -> None:
    found = split(needs, spare, lambda: rates)
    assert "".join(at[0] for at in found.places) == places
    assert found.load == pytest.approx(load) and found.load.seconds == sum(found.load)


def test_the_plan_of_a_measured_machine_is_the_place_that_was_fastest() -> None:
    """Llama-3.2-1B's weights by an H100's link and 16 cores, as `gpu_host` measured them: to stream took least."""
    n, rates = 10**6, Rates(48.9e9, 1.2358e9 / 0.361)
    for states in (8, 10, 2.03):
        assert split([Need(int(states * n), 2 * n, 2 * n, n)], 0, lambda: rates).places == ("paged",)
    slower = Rates(12e9, rates.host)
    assert split([Need(8 * n, 2 * n, 2 * n, n)], 0, lambda: slower).places == ("host",)


# ------------------------------------------------------------------------------------------------------------- in a run


@pytest.fixture
def mixed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what does not stay every second tensor goes to the host; CPU weights go down and up."""

    def mix(needs: Any, spare: int, measure: Any) -> Split:
        found = split(needs, spare, lambda: Rates(1e9, 1e9))
        away = [k for k, at in enumerate(found.places) if at != "resident"]
        places = ["host" if k in away[::2] else "paged" if k in away else "resident" for k in range(len(needs))]
        return found._replace(places=tuple(places))

    monkeypatch.setattr(Hosted, "rehearsal", True)
    monkeypatch.setattr(splitting, "split", mix)


AUTO: dict[str, Any] = {"place": "auto", "page_bytes": 4000, "resident_bytes": 9100}


def test_a_plan_changes_no_bit(mixed: None, device: str, caplog: pytest.LogCaptureFixture) -> None:
    one, two = (weights(SHAPES, torch.bfloat16, device) for _ in range(2))
    opt = ADAMW8.make(two, **AUTO)
    assert opt.plan == {}
    with caplog.at_level(logging.INFO, "refopt_cuda"):
        alike(ADAMW8.make(one), opt)
    (plan,) = opt.plan.values()
    assert sorted(plan.places) == ["host", "paged", "resident", "resident"]
    assert [x.device.type for x in (opt.state[two[2]]["m.codes"], opt.state[two[3]]["exp_avg"])] == [device] * 2
    assert owned(opt) == [at != "resident" for at in plan.places]
    assert len(caplog.records) == 1 and str(plan) in caplog.text and "a step takes" in str(plan)


def test_it_changes_no_bit_during_backward(mixed: None) -> None:
    nets = [model() for _ in range(2)]
    one = rc.optim.AdamW8bit(nets[0].parameters(), **ADAMW8.words)
    two = rc.optim.AdamW8bit(nets[1].parameters(), **ADAMW8.words, **AUTO | {"during_backward": True})
    for net, opt in zip(nets, (one, two), strict=True):
        trained(net, opt, 4)
    assert sorted({*next(iter(two.plan.values())).places}) == ["host", "paged", "resident"]
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_loading_decides_and_keeps_the_plan(mixed: None, device: str) -> None:
    one, two = (weights(SHAPES, torch.bfloat16, device) for _ in range(2))
    opts = ADAMW8.make(one), ADAMW8.make(two, **AUTO)
    alike(*opts)
    again = ADAMW8.make(twins(two, device), **AUTO)
    again.load_state_dict(through_a_file(opts[0].state_dict()))
    assert again.plan == opts[1].plan
    alike(opts[0], again, 2, start=7)
    assert owned(again) == owned(opts[1])


def test_parameters_that_come_later_get_a_place(mixed: None) -> None:
    one, two = (weights(SHAPES, torch.bfloat16, "cpu") for _ in range(2))
    opts = ADAMW8.make(one[:2]), ADAMW8.make(two[:2], **AUTO)
    alike(*opts)
    for opt, params in zip(opts, (one, two), strict=True):
        opt.add_param_group({"params": params[2:]})
    alike(*opts, 2, start=5)
    assert all(p in opts[1]._home.known for p in params_of(opts[1]))


def test_the_machine_is_measured_where_it_matters(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "SAMPLE", 1 << 24)
    monkeypatch.setattr(splitting, "SIDE", 64)
    opt = ADAMW8.make(weights(SHAPES[:1], torch.float32, device), place="auto", resident_bytes=0)
    step(opt, 0)
    (plan,) = opt.plan.values()
    assert plan.rates.link > 1e7 and plan.rates.host > 1e5


def test_a_cpu_keeps_all_of_it() -> None:
    opt = ADAMW8.make(weights(SHAPES, torch.float32, "cpu"), place="auto")
    step(opt, 0)
    (plan,) = opt.plan.values()
    assert set(plan.places) == {"resident"} and plan.rates is None and not any(owned(opt))


def test_a_joint_norm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"AdamW8bit: max_grad_norm needs every .*, got place='auto'"):
        ADAMW8.make(weights(SHAPES, torch.float32, "cpu"), place="auto", max_grad_norm=1.0)
