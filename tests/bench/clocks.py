"""Times and memory of a step: on the device, on the host, and against the device's own copy. All medians.

On a CPU (for trying scripts) the device's time is the host's.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Run = Callable[[], Any]
HERTZ = 1.98e9
"""Cycles a second of the counter that `torch.cuda._sleep` reads, at most."""
LONGEST = 0.02


def nothing() -> None: ...


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def wall_ms(run: Run, device: str, times: int = 20, warm: int = 3, before: Run = nothing) -> float:
    """Milliseconds until a call returns, which waits for no device; `before` runs ahead of each, untimed."""
    taken = []
    for k in range(warm + times):
        before()
        synchronize(device)
        start = time.perf_counter()
        run()
        if k >= warm:
            taken.append(1e3 * (time.perf_counter() - start))
    synchronize(device)
    return statistics.median(taken)


def by_turns(
    runs: Mapping[str, Run], device: str, times: int = 20, warm: int = 3, before: Run = nothing
) -> dict[str, float]:
    """As `wall_ms`, of several calls that are made one after the other in every round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(warm + times):
        for name, run in runs.items():
            ms = wall_ms(run, device, 1, 0, before)
            if k >= warm:
                taken[name].append(ms)
    return {name: statistics.median(some) for name, some in taken.items()}


def device_ms(run: Run, device: str, times: int = 20, warm: int = 3, before: Run = nothing, ahead: float = 0) -> float:
    """Milliseconds between events around a call. The device is kept busy for `ahead` milliseconds first, so that what
    the host needs to enqueue a call that takes no longer is not counted."""
    if device != "cuda":
        return wall_ms(run, device, times, warm, before)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(times)]
    cycles = int(min(ahead * 1e-3, LONGEST) * HERTZ)
    for k in range(warm + times):
        before()
        if cycles:
            torch.cuda._sleep(cycles)
        start, stop = pairs[max(0, k - warm)]
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs)


def copy_bandwidth(device: str, elements: int = 2**30) -> float:
    """Bytes read plus written in a second by a copy of that many float32 on the device itself."""
    try:
        return _copied(torch.empty(elements, dtype=torch.float32, device=device).normal_(), device)
    finally:
        tidy(device)


def _copied(a: torch.Tensor, device: str) -> float:
    b = torch.empty_like(a)
    return 2 * a.nbytes / (device_ms(lambda: b.copy_(a), device) * 1e-3)


def allocated(device: str) -> int:
    """Bytes that torch and CuPy hold for arrays."""
    if device != "cuda":
        return 0
    return torch.cuda.memory_allocated() + _pool("used_bytes")


def extra_bytes(run: Run, device: str) -> int:
    """Bytes that a call holds beyond those before it, at its worst."""
    if device != "cuda":
        run()
        return 0
    torch.cuda.synchronize()
    _pool("free_all_blocks")
    torch.cuda.reset_peak_memory_stats()
    before, pool = torch.cuda.memory_allocated(), _pool("total_bytes")
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + max(0, _pool("total_bytes") - pool)


def _pool(call: str) -> int:
    cupy = sys.modules.get("cupy")  # where it was never imported it holds nothing
    return (getattr(cupy.get_default_memory_pool(), call)() or 0) if cupy else 0


def tidy(device: str) -> None:
    """Give memory back before the next subject."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        _pool("free_all_blocks")
