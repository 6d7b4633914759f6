"""Where frozen weights are decoded: one buffer a device and stream, as large as the largest matrix, for all layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["held", "release", "view"]

_buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
_locks: dict[tuple[torch.device, int], threading.Lock] = {}
_guard = threading.Lock()


def _place(device: torch.device) -> tuple[torch.device, int]:
    return device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


@contextmanager
def view(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Iterator[torch.Tensor]:
    """An uninitialised (rows, columns) tensor that is the caller's inside the block. What reads it must be enqueued
    there, on the current stream; on a CPU another thread waits."""
    place = _place(device)
    with _guard:
        lock = _locks.setdefault(place, threading.Lock())
    with lock:
        need = shape[0] * shape[1] * dtype.itemsize
        if place not in _buffers or _buffers[place].numel() < need:
            _buffers.pop(place, None)  # freed before the larger one is asked for
            _buffers[place] = torch.empty(need, dtype=torch.uint8, device=device)
        yield _buffers[place][:need].view(dtype).view(shape)


def held(device: torch.device | str) -> int:
    """Bytes of the buffers on a device."""
    kind = torch.device(device)
    same = [b for (d, _), b in _buffers.items() if d.type == kind.type and kind.index in (None, d.index)]
    return sum(b.numel() for b in same)


def release() -> None:
    """Give all buffers back; the next use makes new ones."""
    with _guard:
        _buffers.clear()
