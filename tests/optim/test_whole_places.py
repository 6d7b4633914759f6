"""Rules of whole tensors in a place: the bits of the resident step, whole tensors in a page, states that stay there."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.optim import gathered
from refopt_cuda.optim.filing import OnDisk
from refopt_cuda.optim.hosting import Hosted
from refopt_cuda.places import lanes
from tests.optim.pairs import Case, give, snapshot, unchanged, weights
from tests.optim.placed import alike, owned, params_of, step, tensors
from tests.optim.shuffled import Forgetful, ShuffledLanes
from tests.optim.test_checkpoints import through_a_file
from tests.optim.test_paged_gpu import slow_lanes
from tests.optim.test_whole import CASES

pytestmark = pytest.mark.filterwarnings("ignore:.*bitsandbytes")
SHAPES = [(64, 80), (3, 40), (33, 300), (7,), (2, 5, 264), (0, 4), (), (0,), (257,)]
"""Three matrices larger than a page of 4,000 bytes, small ones that share one, and some of nothing."""
CODED = [
    Case("LAMB8bit", "lamb", {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.06}),
    Case("LARS", "lars", {"lr": 0.7, "trust_coefficient": 0.02, "codecs": {"v": "bf16"}}),
    Case("Adafactor8bit", "adafactor", {"lr": 0.02, "relative_step": False, "scale_parameter": False, "beta1": 0.8}),
    Case("CAME8bit", "came", {"lr": 0.003, "weight_decay": 0.2}),
    Case("AdamMini8bit", "adam_mini", {"lr": 0.013, "blocks": "whole"}),
    Case("SM3", "sm3", {"lr": 0.07, "momentum": 0.85, "codecs": "dynamic8"}),
]
LAMB8, CAME = CODED[0], CASES[6]


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU weights go down to the host's stage, and pages of files through a ring, as a GPU's would."""
    monkeypatch.setattr(Hosted, "rehearsal", True)
    monkeypatch.setattr(OnDisk, "rehearsal", True)


def pair(case: Any, device: str, shapes: Any = SHAPES, size: int = 4000, **options: Any) -> tuple[Any, Any]:
    """The same optimizer twice: states beside the weights, and in another place, usually "paged"."""
    one, two = weights(shapes, torch.float32, device), weights(shapes, torch.float32, device)
    where = {"place": "paged", "page_bytes": size} | options
    return case.make(one), case.make(two, **where)


def pages_of(opt: Any) -> list[Any]:
    return [page for shelf in opt._shelves.values() for book in shelf.books.values() for page in book.pages]


# ------------------------------------------------------------------------------------------------------- the same bits


@pytest.mark.parametrize("size", [1, 4000])
@pytest.mark.parametrize("case", [*CASES, *CODED], ids=str)
def test_paging_changes_no_bit(case: Any, size: int, device: str) -> None:
    """A tensor a page, and small ones that share one."""
    one, two = pair(case, device, size=size)
    alike(one, two)
    assert all(owned(two))


@pytest.mark.parametrize("case", [LAMB8, CAME, *CODED[4:]], ids=str)
def test_stepping_on_the_host_changes_no_bit(case: Any, device: str) -> None:
    one, two = pair(case, device, place="host")
    alike(one, two)
    assert all(owned(two))


@pytest.mark.parametrize(
    ("case", "through"), [(LAMB8, False), (CODED[-1], True)], ids=["from the host's pages", "through a ring"]
)
def test_files_change_no_bit_and_are_gone_on_with(
    case: Any, through: bool, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnDisk, "rehearsal", through)
    one, two = pair(case, device, place="disk", path=tmp_path, keep_weights=True)
    alike(one, two)
    fresh = case.make(weights(SHAPES, torch.float32, device, 1), place="disk", path=tmp_path, keep_weights=True)
    two._home.finish()
    del two
    assert fresh.resume() == 3
    alike(one, fresh, 2, start=5)


def test_groups_share_the_ring_and_lack_gradients_by_turns(device: str) -> None:
    def make(place: dict[str, Any]) -> Any:
        a, b, c, d = weights([(64, 80), (90, 64), (33,), (7, 9)], torch.float32, device)
        groups = [{"params": [a, d]}, {"params": [b, c], "lr": 0.3, "betas": (0.7, 0.9), "codecs": {"m": "bf16"}}]
        return rc.optim.LAMB8bit(groups, **place)

    one, two = make({}), make({"place": "paged", "page_bytes": 2000})
    for t, idle in enumerate([0, 1, 3]):
        for opt in (one, two):
            give(params_of(opt), t)
            params_of(opt)[idle].grad = None
            opt.step()
    for opt in (one, two):
        opt.add_param_group({"params": weights([(70, 64), (9,)], torch.float32, device)})
    alike(one, two, 2, start=9)


def test_gradients_are_clipped_before_a_page_is_stepped(device: str) -> None:
    one, two = weights(SHAPES, torch.float32, device), weights(SHAPES, torch.float32, device)
    one, two = LAMB8.make(one, max_grad_norm=0.3), LAMB8.make(two, max_grad_norm=0.3, place="paged")
    alike(one, two)


def test_parameters_in_another_order_are_stepped_through_a_copy(device: str) -> None:
    opts = pair(LAMB8, device, [(96, 64), (40, 300)])
    for opt in opts:
        p, q = params_of(opt)
        p.data, q.data = p.detach().clone().t().contiguous().t(), torch.cat([q.detach()] * 2, 1)[:, :300]
    alike(*opts)


@pytest.mark.parametrize("place", ["paged", "host"])
def test_any_order_that_the_events_allow_gives_the_same_bits(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are NaN as soon as they are free; loads run ahead, stores are late by up to a step."""
    poisons = {"paged": lanes.OUT, "host": lanes.IN}[place]
    for seed in range(3):
        monkeypatch.setattr(lanes, "lanes_of", lambda kind, device, seed=seed: ShuffledLanes(seed, poisons))
        for case in (LAMB8, CAME):
            alike(*pair(case, "cpu", [(64, 80), (33, 300), (40,), (64, 64), (90, 70)], 1, place=place))


@pytest.mark.parametrize("lane", [lanes.IN, lanes.STEP, lanes.OUT], ids=["stored", "loaded", "stepped"])
def test_an_event_that_is_not_waited_for_shows(lane: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Forgetful(1, lanes.OUT, lane))
    with pytest.raises(AssertionError, match="tensor"):
        alike(*pair(CAME, "cpu", [(64, 80), (33, 300), (40,), (64, 64), (90, 70)], 1), 4)


# ------------------------------------------------------------------------------------------------- where the states are


def test_a_page_holds_whole_tensors_and_small_ones_share_a_copy() -> None:
    _, opt = pair(CASES[0], "cpu", [(40,)] * 30 + [(64, 80)] + [(40,)] * 5, 30 * 500)
    step(opt, 0)
    assert [len(page.pieces) for page in pages_of(opt)] == [30, 1, 5]
    assert [len(page.copies) for page in pages_of(opt)] == [1, 1, 1]
    (deck,) = opt._home.decks.values()
    assert deck.ring.sizes[1] == 8 * 64 * 80 and sum(deck.ring.sizes) == deck.memory.nbytes < 2 * deck.ring.size


@pytest.mark.parametrize("case", [CASES[4], Case("SM3", "sm3", {"lr": 0.07}), LAMB8], ids=str)
def test_the_stage_of_a_host_has_room_for_a_few_tensors(case: Any) -> None:
    """Whatever their states: those of Adafactor and SM3 are a thousandth of their weights."""
    shapes = [(64, 80)] * 6
    opt = case.make(weights(shapes, torch.float32, "cpu"), place="host", page_bytes=2 * 8 * 64 * 80)
    step(opt, 0)
    assert [len(page.pieces) for page in pages_of(opt)] in ([1] * 6, [2] * 3)
    assert 8 * 64 * 80 <= opt._home.decks[torch.device("cpu")].ring.size <= 2 * 8 * 64 * 80


@pytest.mark.parametrize("shapes", [[(64, 128)] * 4, [(512, 64), *[(64, 64)] * 5]], ids=["equal", "a giant"])
def test_the_ring_is_what_is_predicted_at_most(shapes: Any, device: str) -> None:
    """Three places; those that no giant passes through are smaller."""
    _, opt = pair(CASES[0], device, shapes)
    step(opt, 0)
    (deck,) = opt._home.decks.values()
    plan = refopt.Optimizer("lamb", place=refopt.places.paged(buffers=3))
    most = refopt.memory.train(shapes, plan).states
    assert deck.memory.nbytes == sum(deck.ring.sizes) == (most if len(set(shapes)) == 1 else 8 * 64 * (512 + 2 * 64))
    assert deck.memory.device.type == device


@pytest.mark.parametrize(
    ("budget", "stays"), [(0, [0, 0, 0]), (11000, [1, 0, 0]), (9000, [0, 1, 1]), ("auto", [1] * 3)]
)
def test_what_fits_the_budget_stays(budget: Any, stays: list[int], device: str) -> None:
    """States of 10,752 bytes, 8,000 and 320."""
    one, two = pair(LAMB8, device, [(64, 80), (1000,), (40,)], resident_bytes=budget)
    alike(one, two)
    assert owned(two) == [not s for s in stays]
    if all(stays):
        assert not pages_of(two) and all(deck.ring.size == 0 for deck in two._home.decks.values())


@pytest.mark.parametrize("place", ["paged", "host"])
def test_a_checkpoint_is_that_of_the_resident_optimizer_and_loading_keeps_the_place(place: str, device: str) -> None:
    one, two = pair(LAMB8, device, place=place)
    alike(one, two)
    saved = through_a_file(two.state_dict())
    again = LAMB8.make([torch.nn.Parameter(p.detach().clone()) for p in params_of(two)], place=place, page_bytes=777)
    again.load_state_dict(through_a_file(one.state_dict(), map_location="cpu"))
    assert all(owned(again))
    one.load_state_dict(saved)
    alike(one, again, 2, start=7)


def test_loading_goes_into_the_memory_that_is_there(device: str) -> None:
    _, opt = pair(CAME, device)
    step(opt, 0)
    saved, where = copy.deepcopy(opt.state_dict()), [x.data_ptr() for x in tensors(opt)]
    step(opt, 1)
    opt.load_state_dict(saved)
    assert [x.data_ptr() for x in tensors(opt)] == where
    for k, p in enumerate(params_of(opt)):
        assert all(torch.equal(x, saved["state"][k][key]) for key, x in opt.state[p].items() if torch.is_tensor(x))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_pages_too(way: Callable[[Any], Any]) -> None:
    _, opt = pair(LAMB8, "cpu")
    step(opt, 0)
    other = way(opt)
    alike(opt, other, 2, start=5)
    assert all(owned(other)) and other._placed == opt._placed


def test_states_that_somebody_moved_are_brought_back(device: str) -> None:
    one, two = pair(CAME, device)
    alike(one, two)
    for p, entry in list(two.state.items()):
        two.state[p] = {k: x.to(device, copy=True) if torch.is_tensor(x) else x for k, x in entry.items()}
    assert not any(owned(two))
    alike(one, two, 2, start=5)
    assert all(owned(two))


# ------------------------------------------------------------------------------------------------------ names and words


@pytest.mark.parametrize("name", ["LAMB", "LARS8bit", "Adafactor4bit", "CAMEFp8", "AdamMini32bit", "SM3"])
def test_the_names_are_the_rules_in_host_memory(name: str) -> None:
    opt = getattr(rc.optim, f"Paged{name}")(weights([(4, 20)], torch.float32, "cpu"))
    assert isinstance(opt, getattr(rc.optim, name)) and opt._placed.place == "paged"
    assert opt.usual == getattr(rc.optim, name).usual


def test_a_refused_step_changes_nothing(device: str) -> None:
    _, opt = pair(LAMB8, device, [(64, 80), (40,)])
    step(opt, 0)
    before = snapshot(opt)
    opt.state[params_of(opt)[1]]["m"] = torch.zeros(41)
    give(params_of(opt), 1)
    with pytest.raises(refopt.ShapeError, match="'m' has shape"):
        opt.step()
    opt.state[params_of(opt)[1]]["m"] = before[1][1]["m"]
    unchanged(opt, before)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"place": "auto"}, ValueError, "LAMB: place must be one of 'resident', 'paged', 'host', 'disk'.*'auto'"),
        ({"page_bytes": 5}, ValueError, "LAMB: page_bytes is of place='paged'"),
        ({"place": "paged", "page_bytes": 0}, ValueError, "LAMB: page_bytes must be a whole number >= 1, got 0"),
        ({"place": "disk"}, ValueError, "LAMB: place='disk' needs path"),
        ({"place": "paged", "capturable": True}, ValueError, "LAMB: capturable is of place='resident'"),
        ({"place": "host", "max_grad_norm": 1.0}, ValueError, "LAMB: max_grad_norm needs every gradient's norm"),
        ({"place": "paged", "during_backward": True}, TypeError, "LAMB: no argument 'during_backward'"),
    ],
)
def test_a_wrong_place_is_named(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        rc.optim.LAMB(weights([(4,)], torch.float32, "cpu"), **options)


def test_shards_are_refused_before_anything_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "any_sharded", lambda opt: True)
    _, opt = pair(CAME, "cpu", [(4, 5)])
    give(params_of(opt), 0)
    before = snapshot(opt)
    with pytest.raises(ValueError, match=r"CAME\.step: place='paged': sharded parameters of this rule"):
        opt.step()
    unchanged(opt, before)


def test_only_files_are_gone_on_with() -> None:
    _, opt = pair(CAME, "cpu", [(4, 5)])
    with pytest.raises(ValueError, match=r"CAME\.resume: only place='disk' leaves states"):
        opt.resume()


# ------------------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("cycles", [[300_000, 0, 0], [0, 0, 300_000]], ids=["in", "out"])
@pytest.mark.parametrize("case", [LAMB8, CAME], ids=str)
def test_slow_copies_and_poisoned_places_change_no_bit(
    case: Any, cycles: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = slow_lanes(cycles)
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: slow(device))
    alike(*pair(case, "cuda", [(64, 80), (33, 300), (256, 256), (40,), (64, 64), (90, 70)], 20_000), steps=4)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [LAMB8, CASES[0], CAME, CODED[-1]], ids=str)
def test_a_step_that_the_scaler_skips_leaves_pages_as_they_are(case: Any) -> None:
    """The device alone knows of it: pages come and go, and nothing waits."""
    opts = pair(case, "cuda")
    for t, inf in enumerate([0.0, 1.0, 0.0, 1.0]):
        for opt in opts:
            opt.grad_scale, opt.found_inf = (torch.tensor(x, device="cuda") for x in (8.0, inf))
            step(opt, t)
    one, two = opts
    for p, q in zip(params_of(one), params_of(two), strict=True):
        assert torch.equal(p, q)
        for key, x in one.state[p].items():
            assert torch.equal(x.cpu(), two.state[q][key].cpu()) if torch.is_tensor(x) else x == two.state[q][key]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["PagedLAMB", "PagedCAME", "PagedAdamMini"])
def test_the_device_holds_the_ring_and_no_state(name: str) -> None:
    """64M weights: f32 moments of LAMB would be 512 MB."""
    params = [torch.nn.Parameter(torch.ones(2048, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(8)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = getattr(rc.optim, name)(params)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(2):
        opt.step()
    torch.cuda.synchronize()
    (deck,) = opt._home.decks.values()
    assert torch.cuda.memory_allocated() - before <= sum(deck.ring.sizes) + 4096 and all(owned(opt))
