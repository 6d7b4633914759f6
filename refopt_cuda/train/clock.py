"""Seconds and bytes of a run: what a step of the optimizer takes, what training takes, and the peak of memory."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class Watch:
    """Runs while training does; `aside` takes out what is no part of it, `step` times the optimizer.

    On a GPU a step is timed by events on its stream, and nothing waits for the device but `aside` and `read`.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.steps: list[Any] = []
        self.away = 0.0
        self.since = self._now()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        if self.cuda:
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            yield
            pair[1].record()
            self.steps.append(pair)
        else:
            start = time.perf_counter()
            yield
            self.steps.append(1e3 * (time.perf_counter() - start))

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        start = self._now()
        yield
        self.away += self._now() - start

    def read(self) -> tuple[float, list[float]]:
        """(seconds of training, milliseconds of each optimizer step) since the last call."""
        now = self._now()
        seconds = now - self.since - self.away
        steps = [a.elapsed_time(b) for a, b in self.steps] if self.cuda else self.steps
        self.since, self.away, self.steps = now, 0.0, []
        return seconds, steps


def reset_peak(device: str) -> None:
    """Count peak memory from here: of the allocator on a GPU, of the process elsewhere (on Linux)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """Peak bytes since `reset_peak`."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError, KeyError):
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
