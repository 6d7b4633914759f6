"""Paging on a GPU: copies that are held up, memory of the whole device, limits that bind, and waits."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.places import lanes
from tests.optim.pairs import give, weights
from tests.optim.placed import (
    ADAMW8,
    alike,
    loss,
    model,
    owned,
    pair,
    params_of,
    step,
    trained,
)

pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("cycles", [[300_000, 0, 0], [0, 0, 300_000], [200_000, 0, 100_000]], ids=["in", "out", "both"])
def test_slow_copies_and_poisoned_places_change_no_bit(cycles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slow_lanes(cycles)
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: slow(device))
    alike(*pair(ADAMW8, [(64, 80), (33, 300), (256, 256), (40,)], torch.bfloat16, "cuda", 20_000), steps=4)


@pytest.mark.parametrize("cycles", [[300_000, 0, 0], [0, 0, 300_000], [200_000, 0, 100_000]], ids=["in", "out", "both"])
def test_slow_copies_change_no_bit_of_what_the_host_steps(cycles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slow_lanes(cycles, poisons=False)
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: slow(device))
    shapes = [(64, 80), (33, 300), (256, 256), (40,)]
    alike(*pair(ADAMW8, shapes, torch.bfloat16, "cuda", 20_000, "host"), steps=4)


@pytest.mark.parametrize("late", ["gradients", "pages", "forward on a stream of its own"])
def test_steps_within_backward_wait_for_gradients_and_for_pages(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks run long before the device has come there: a spinning kernel is before each gradient, or each copy. What is
    freed is overwritten at once, on the caller's stream."""
    if late == "pages":
        slow = slow_lanes([10_000_000, 0, 0])
        monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: slow(device))
    aside = torch.cuda.Stream() if late.startswith("forward") else None
    nets = [model(device="cuda") for _ in range(2)]
    words = ADAMW8.words | {"min_8bit_size": 1000}
    one = rc.optim.AdamW8bit(nets[0].parameters(), **words)
    two = rc.optim.AdamW8bit(nets[1].parameters(), **words, place="paged", page_bytes=3000, during_backward=True)
    trained(nets[0], one, 4)
    trained(nets[1], two, 1)
    if late != "pages":
        for layer in nets[1]:
            layer.register_full_backward_hook(lambda *_: torch.cuda._sleep(3_000_000))
    for t in range(1, 4):
        two.zero_grad()
        forward(nets[1], t, aside).backward()
        two.zero_grad()  # their memory is anybody's, but for what the steps still read
        spoilt = [torch.full_like(p, torch.nan) for p in nets[1].parameters()]
        two.step()
        torch.cuda.synchronize()
        del spoilt
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and one.state[p]["step"] == two.state[q]["step"] == 4


def forward(net: Any, seed: int, stream: torch.cuda.Stream | None) -> torch.Tensor:
    """The loss, from a forward pass on this stream; backward goes on there."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        found = loss(net, seed)
    torch.cuda.current_stream().wait_stream(stream or torch.cuda.current_stream())
    return found


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


def test_without_locked_memory_the_bits_are_the_same(record_property: Callable[[str, Any], None]) -> None:
    """`ulimit -l 0`. Whether a driver heeds it is the driver's affair, and printed."""
    run = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record_property("printed", run.stdout.strip())


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
