"""Pages in any order, poisoned places, memory that is refused, wrong words: what a pager must bear or refuse."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.optim import pieces
from refopt_cuda.optim.hosting import Hosted
from refopt_cuda.places import lanes, paged, slabs
from tests.optim.pairs import give, snapshot, unchanged, weights
from tests.optim.placed import (
    ADAMW,
    ADAMW8,
    PAGES,
    alike,
    owned,
    pair,
    params_of,
    step,
)
from tests.optim.shuffled import ShuffledLanes

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

    class Forgetful(ShuffledLanes):
        def wait(self, lane: int, event: Any) -> None:
            if lane != {"stored": lanes.IN, "loaded": lanes.STEP, "stepped": lanes.OUT}[forgotten]:
                super().wait(lane, event)

    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Forgetful(1))
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


# ------------------------------------------------------------------------------------------------------------ on a GPU


SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def slow_lanes(cycles: list[int], poisons: bool = True) -> Any:
    """Copies that a spinning kernel holds up for so long in each lane, and places that are NaN once they are stored."""
    import cupy

    spin = cupy.RawKernel(SPIN, "spin")

    class Slow(lanes.CudaLanes):
        def copy(self, lane: int, to: int, source: int, size: int) -> None:
            with self._streams[lane // 2]:
                spin((1,), (1,), (cycles[lane],))
            super().copy(lane, to, source, size)
            if lane == lanes.OUT and poisons:
                self._run.memsetAsync(source, 0xFF, size, self.handles[lane])

    return Slow


@pytest.mark.gpu
@pytest.mark.parametrize("cycles", [[300_000, 0, 0], [0, 0, 300_000], [200_000, 0, 100_000]], ids=["in", "out", "both"])
def test_slow_copies_and_poisoned_places_change_no_bit(cycles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slow_lanes(cycles)
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: slow(device))
    alike(*pair(ADAMW8, [(64, 80), (33, 300), (256, 256), (40,)], torch.bfloat16, "cuda", 20_000), steps=4)


@pytest.mark.gpu
@pytest.mark.parametrize("cycles", [[300_000, 0, 0], [0, 0, 300_000], [200_000, 0, 100_000]], ids=["in", "out", "both"])
def test_slow_copies_change_no_bit_of_what_the_host_steps(cycles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slow_lanes(cycles, poisons=False)
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: slow(device))
    shapes = [(64, 80), (33, 300), (256, 256), (40,)]
    alike(*pair(ADAMW8, shapes, torch.bfloat16, "cuda", 20_000, "host"), steps=4)


LIMITED = r"""
import resource, warnings
import torch
import refopt_cuda as rc
resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
one, two = ([torch.nn.Parameter(torch.linspace(-1, 1, 512 * 512, device="cuda").view(512, 512))] for _ in range(2))
opts = rc.optim.AdamW8bit(one), rc.optim.PagedAdamW8bit(two, page_bytes=100_000)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    for t in range(3):
        for params, opt in zip((one, two), opts):
            params[0].grad = torch.full_like(params[0], 0.1 * (t + 1))
            opt.step()
pinned = [w for w in said if "could not be pinned" in str(w.message)]
assert torch.equal(one[0], two[0]) and len(pinned) <= 1
print("refused, and one warning says so" if pinned else "pinned all the same: this driver does not count locked memory")
"""


@pytest.mark.gpu
def test_without_locked_memory_the_bits_are_the_same(record_property: Callable[[str, Any], None]) -> None:
    """`ulimit -l 0`. Whether a driver heeds it is the driver's affair, and printed."""
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record_property("printed", run.stdout.strip())


@pytest.mark.gpu
def test_the_device_holds_the_ring_and_no_state() -> None:
    """64M weights: f32 states would be 512 MB; the ring is three pages."""
    params = [torch.nn.Parameter(torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = rc.optim.PagedAdamW(params)
    torch.cuda.synchronize()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(2):
        opt.step()
    torch.cuda.synchronize()
    ring = 3 * next(iter(opt._home.decks.values())).ring.size
    assert torch.cuda.memory_allocated() - before <= ring + 4096
    assert free - torch.cuda.mem_get_info()[0] <= ring + (64 << 20), "kernels and their tables, beside the ring"
    loaded = rc.optim.PagedAdamW([torch.nn.Parameter(p.detach()) for p in params])
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    loaded.load_state_dict(opt.state_dict())
    assert torch.cuda.max_memory_allocated() == held, "loading went through the device"
    assert all(owned(loaded)) and all(owned(opt))


@pytest.mark.gpu
def test_fifty_optimizers_leave_nothing_on_the_device() -> None:
    def once() -> None:
        (p,) = weights([(512, 512)], torch.bfloat16, "cuda")
        opt = rc.optim.PagedAdamW8bit([p], page_bytes=100_000)
        step(opt, 0)
        opt.state_dict()

    for _ in range(5):  # what the driver keeps for itself is there then
        once()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    for _ in range(50):
        once()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= held and free - torch.cuda.mem_get_info()[0] <= 4 << 20


@pytest.mark.gpu
def test_a_step_waits_for_nothing_and_states_for_the_last_copy() -> None:
    one, two = pair(ADAMW8, [(512, 512), (300,)], torch.bfloat16, "cuda", 100_000)
    alike(one, two)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    give(params_of(one), 7)
    give(params_of(two), 7)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        two.step()
        assert not stream.query(), "the step waited for the stream"
        codes = two.state[params_of(two)[0]]["m.codes"].clone()
    one.step()
    assert torch.equal(codes, one.state[params_of(one)[0]]["m.codes"].cpu())


@pytest.mark.gpu
def test_states_that_do_not_fit_beside_the_weights_train_paged() -> None:
    """All device memory through an allocator that a limit binds: resident states fail, paged ones do not."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    params = [torch.nn.Parameter(torch.zeros(4096, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(8)]
    for p in params:
        p.grad = torch.ones_like(p)
    limit = torch.cuda.memory_reserved() + (256 << 20)  # the states take 1 GiB
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"place=\"paged\""):
            rc.optim.AdamW(params).step()
        gc.collect()
        torch.cuda.empty_cache()
        opt = rc.optim.PagedAdamW(params)
        opt.step()
        torch.cuda.synchronize()
        assert all(owned(opt)) and all(bool((p != 0).all()) for p in params)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
