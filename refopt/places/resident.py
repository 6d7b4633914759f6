"""Resident: all states live beside the weights, and the whole tensor is one page. Nothing moves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from refopt.spec import Load, Peak, Place


def pages(blocks: int, size: int) -> Iterator[tuple[int, int]]:
    """One page: every block."""
    if blocks:
        yield 0, blocks


def peak(loads: Sequence[Load], buffers: int) -> Peak:
    """Weights, gradients and states, all on the device."""
    return Peak(device=sum(load.p + load.g + load.states for load in loads))


place = Place("resident", "states beside the weights", "-", pages, peak)
