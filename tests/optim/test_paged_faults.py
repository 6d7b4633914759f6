"""Pages in any order, poisoned places, memory that is refused, wrong words: what a pager must bear or refuse."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.optim import pieces, worker
from refopt_cuda.optim.hosting import Hosted
from refopt_cuda.places import lanes, paged, slabs
from tests.optim.pairs import give, snapshot, unchanged, weights
from tests.optim.placed import (
    ADAMW,
    ADAMW8,
    PAGES,
    alike,
    pair,
    params_of,
    step,
)
from tests.optim.shuffled import Forgetful, ShuffledLanes

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")
every_page = pytest.mark.parametrize("size", PAGES.values(), ids=PAGES)


@every_page
def test_any_order_that_the_events_allow_gives_the_same_bits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are NaN as soon as they are stored; loads run ahead, stores are late by up to a step."""
    for seed in range(4):
        monkeypatch.setattr(lanes, "lanes_of", lambda kind, device, seed=seed: ShuffledLanes(seed))
        one, two = pair(ADAMW8, [(64, 80), (33, 300), (40,)], torch.float32, "cpu", size)
        alike(one, two, 4)
    order = next(iter(two._home.decks.values())).lanes.order
    if size == 1:
        assert "in in" in " ".join(order), "no load ran ahead"
        assert any(a == "out" and b == "in" for a, b in zip(order, order[1:], strict=False))


@pytest.mark.parametrize("forgotten", ["stored", "loaded", "stepped"])
def test_an_event_that_is_not_waited_for_shows(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would say of a pager that forgets one of its three waits."""

    lane = {"stored": lanes.IN, "loaded": lanes.STEP, "stepped": lanes.OUT}[forgotten]
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Forgetful(1, lanes.OUT, lane))
    one, two = pair(ADAMW8, [(64, 80), (33, 300)], torch.float32, "cpu", 1)
    with pytest.raises(AssertionError, match="tensor"):
        alike(one, two, 4)


def test_where_pinning_fails_one_warning_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(lanes.HostLanes):
        def pin(self, address: int, size: int) -> None:
            raise MemoryError("cannot lock memory")

    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Refused())
    one, two = pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu")
    with pytest.warns(
        UserWarning, match=r"AdamW8bit\.step: host memory could not be pinned.*a fraction of the link"
    ) as w:
        alike(one, two)
    assert len(w) == 1


def test_a_limit_of_locked_memory_that_is_reached_midway_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was pinned before stays so, and is unpinned in the end; what comes later is pageable."""
    pinned: dict[int, int] = {}

    class Limited(lanes.HostLanes):
        def pin(self, address: int, size: int) -> None:
            if sum(pinned.values()) + size > 5 * slabs.PAGE:
                raise MemoryError("the limit of locked memory is reached")
            pinned[address] = size

        def unpin(self, address: int) -> None:
            del pinned[address]

    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Limited())
    one, two = pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu")
    alike(one, two)
    assert pinned
    for opt in (one, two):
        opt.add_param_group({"params": weights([(128, 80)], torch.float32, "cpu")})
    with pytest.warns(UserWarning, match=r"could not be pinned .*limit of locked memory is reached") as w:
        alike(one, two, 3, start=5)
    assert len(w) == 1
    del one, two, opt
    gc.collect()
    assert not pinned


WAYS = {"paged": {"place": "paged"}, "host": {"place": "host"}, "delay": {"place": "host", "delay": 1}}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_fifty_optimizers_leave_no_memory_no_pin_and_no_thread(
    way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: dict[int, int] = {}

    class Counted(lanes.HostLanes):
        def pin(self, address: int, size: int) -> None:
            assert address % slabs.PAGE == 0 and address // slabs.CHUNK == (address + size - 1) // slabs.CHUNK
            pinned[address] = size

        def unpin(self, address: int) -> None:
            del pinned[address]

    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Counted())
    monkeypatch.setattr(Hosted, "rehearsal", True)
    worker.submit(int).result()  # the thread that all share
    gone, threads = [], threading.active_count()
    for k in range(50):
        opt = ADAMW8.make(weights([(64, 80), (40,)], torch.float32, "cpu"), **way)
        step(opt, 0)
        (deck,) = opt._home.decks.values()
        assert sum(pinned.values()) >= deck.slabs.size > 0
        gone += [weakref.ref(deck), *(weakref.ref(slab.bytes) for slab in deck.slabs._slabs)]
        del opt, deck
        if k % 10 == 9:
            gc.collect()
            assert not pinned and all(x() is None for x in gone)
    assert threading.active_count() <= threads


def test_no_copy_crosses_the_end_of_a_registration() -> None:
    start = 5 * slabs.CHUNK - 300
    found = paged.joined([paged.Copy(0, start, 100), paged.Copy(128, start + 128, 2 * slabs.CHUNK)])
    assert [(c.offset, c.address, c.size) for c in found] == [
        (0, start, 300),
        (300, start + 300, slabs.CHUNK),
        (300 + slabs.CHUNK, start + 300 + slabs.CHUNK, slabs.CHUNK - 172),
    ]


def test_arrays_apart_in_either_memory_travel_apart() -> None:
    copies = [paged.Copy(0, 4096, 64), paged.Copy(64, 4160, 10), paged.Copy(128, 9000, 4), paged.Copy(192, 9064, 0)]
    assert paged.joined(copies) == (paged.Copy(0, 4096, 74), paged.Copy(128, 9000, 4))


def test_a_refused_step_changes_nothing(device: str) -> None:
    _, opt = pair(ADAMW8, [(64, 80), (40,)], torch.float32, device)
    step(opt, 0)
    before = snapshot(opt)
    opt.state[params_of(opt)[1]]["exp_avg"] = torch.zeros(41)
    give(params_of(opt), 1)
    with pytest.raises(refopt.ShapeError, match="'exp_avg' has shape"):
        opt.step()
    opt.state[params_of(opt)[1]]["exp_avg"] = before[1][1]["exp_avg"]
    unchanged(opt, before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"place": "cloud"}, r"AdamW8bit: place must be one of 'resident', 'paged'.*'cloud'"),
        ({"page_bytes": 5}, r"AdamW8bit: page_bytes is of place='paged', 'host' or 'auto', and place"),
        ({"place": "paged", "page_bytes": 0}, r"AdamW8bit: page_bytes must be a whole number >= 1, got 0"),
        (
            {"during_backward": True},
            r"AdamW8bit: during_backward is of place='paged', 'host' or 'auto', and",
        ),
        ({"place": "paged", "resident_bytes": "all"}, r"AdamW8bit: resident_bytes must be .* or \"auto\", got 'all'"),
    ],
)
def test_a_wrong_place_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rc.optim.AdamW8bit(weights([(4,)], torch.float32, "cpu"), **options)


def test_a_page_takes_as_many_tensors_as_a_launch() -> None:
    slots = one_step([(2,)] * 3100)._plans[0].slots.values()
    counts = [len(page.pieces) for page in pieces.pages(map(pieces.Grid, slots), 1 << 30, 0)]
    assert sum(counts) == 3100 and max(counts) <= 3072


def one_step(shapes: Any) -> Any:
    opt = ADAMW.make(weights(shapes, torch.float32, "cpu"))
    step(opt, 0)
    return opt
