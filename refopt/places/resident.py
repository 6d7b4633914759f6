"""Resident: all states live beside the weights, and the whole tensor is one page. Nothing moves."""

from __future__ import annotations

from collections.abc import Iterator

from refopt.spec import Place


def pages(blocks: int, size: int) -> Iterator[tuple[int, int]]:
    """One page: every block."""
    if blocks:
        yield 0, blocks


place = Place("resident", "states beside the weights", "-", pages)
