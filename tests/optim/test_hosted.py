"""`place="host"`: the bits of the resident step, states and arithmetic on the host, weights on their device."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.codecs import WEIGHTS
from refopt_cuda.optim import hosting, worker
from refopt_cuda.optim.hosting import Hosted
from refopt_cuda.places import lanes
from tests.kernels.covering import words_of
from tests.optim import placed
from tests.optim.pairs import CASES, Case, weights
from tests.optim.placed import ADAMW, ADAMW8, PAGES, SMALL, alike, owned, params_of, step
from tests.optim.shuffled import Forgetful, ShuffledLanes

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")
pair = partial(placed.pair, place="host")
every_page = pytest.mark.parametrize("size", PAGES.values(), ids=PAGES)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU weights go down and up as a GPU's would."""
    monkeypatch.setattr(Hosted, "rehearsal", True)


@every_page
@pytest.mark.parametrize("case", CASES, ids=str)
def test_stepping_on_the_host_changes_no_bit(case: Case, size: int, device: str) -> None:
    one, two = pair(case, SMALL, torch.float32, device, size, min_8bit_size=1000)
    alike(one, two)
    assert all(owned(two))


@pytest.mark.parametrize("weight", words_of(WEIGHTS))
def test_stepping_on_the_host_changes_no_bit_of_any_format_of_weights(weight: str, device: str) -> None:
    options = {"codecs": {"p": weight, "v": "q4:64"}, "min_8bit_size": 1000, "seed": 5}
    alike(*pair(ADAMW, SMALL, torch.bfloat16, device, 3000, **options), steps=2)


@every_page
def test_any_order_that_the_events_allow_gives_the_same_bits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Staging places are NaN as soon as their weights have gone up."""
    for seed in range(4):
        monkeypatch.setattr(lanes, "lanes_of", lambda kind, device, seed=seed: ShuffledLanes(seed, lanes.IN))
        alike(*pair(ADAMW8, [(64, 80), (33, 300), (40,)], torch.bfloat16, "cpu", size), 4)


@pytest.mark.parametrize("lane", [lanes.IN, lanes.OUT, lanes.STEP])
def test_an_event_that_is_not_waited_for_shows(lane: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Forgetful(2, lanes.IN, lane, host=lane == lanes.IN))
    with pytest.raises(AssertionError, match="tensor"):
        alike(*pair(ADAMW8, [(64, 80), (33, 300), (40,)], torch.bfloat16, "cpu", 1), 4)


def test_weights_that_somebody_has_changed_are_stepped_as_they_are(device: str) -> None:
    """The host keeps no copy of them that could be old."""
    opts = pair(ADAMW8, [(64, 80), (40,)], torch.bfloat16, device)
    alike(*opts)
    for opt in opts:
        with torch.no_grad():
            params_of(opt)[0].mul_(0.5)
    alike(*opts, steps=1, start=5)


def test_weights_on_the_cpu_are_stepped_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Hosted, "rehearsal", False)
    one, two = pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu")
    alike(one, two)
    assert not any(plan.books for plan in two._plans.values())


@pytest.mark.parametrize("name", ["AdamW", "Lion", "Adagrad"])
def test_the_names_are_the_rules_on_the_host(name: str, device: str) -> None:
    one, two = weights([(64, 80), (40,)], torch.float32, device), weights([(64, 80), (40,)], torch.float32, device)
    alike(getattr(rc.optim, name)(one), opt := getattr(rc.optim, f"CPU{name}")(two))
    assert opt._placed.place == "host" and all(owned(opt))


def test_loading_keeps_the_place_and_moves_between_places(device: str) -> None:
    one, two = pair(ADAMW8, SMALL, torch.bfloat16, device)
    alike(one, two)
    one.load_state_dict(two.state_dict())
    two.load_state_dict(one.state_dict())
    alike(one, two, 2, start=7)
    assert all(owned(two))


def test_pages_are_as_large_as_what_passes() -> None:
    """Codes of a byte or less beside weights and gradients of four."""
    for name in ("AdamW8bit", "AdamW4bit", "AdamW"):
        opt = getattr(rc.optim, name)(weights([(64, 80)] * 4, torch.float32, "cpu"), place="host", page_bytes=16384)
        step(opt, 0)
        (deck,) = opt._home.decks.values()
        assert 16384 * 0.8 < deck.ring.size < 16384 * 1.1


def test_an_interrupted_step_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = ADAMW8.make(weights(SMALL, torch.float32, "cpu"), place="host", page_bytes=4000)
    step(opt, 0)

    def interrupted(jobs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hosting, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            step(opt, 1)
        jobs = list(opt._home._ahead)
    assert jobs
    opt.state_dict()
    assert all(job.done() for job in jobs) and not opt._home._ahead


def test_the_thread_takes_as_many_threads_as_the_step_had() -> None:
    """Also where another thread, as autograd's is, gives it work."""
    most = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        worker.heed()
        with ThreadPoolExecutor(1) as other:
            assert other.submit(lambda: worker.submit(numba.get_num_threads).result()).result() == 1
    finally:
        numba.set_num_threads(most)
        worker.heed()


@pytest.mark.gpu
def test_no_state_and_no_stage_is_on_the_device() -> None:
    params = [torch.nn.Parameter(torch.ones(2048, 2048, device="cuda", dtype=torch.bfloat16)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = rc.optim.CPUAdamW(params, codecs={"p": "bf16_rem16"})
    gc.collect()
    before = torch.cuda.memory_allocated()
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    assert all(x.device.type == "cpu" for s in opt.state.values() for x in s.values() if torch.is_tensor(x))
    step(opt, 1)
