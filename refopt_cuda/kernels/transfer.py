"""Quantize and dequantize, as the walk of `step.cu` knows them: rules with one state that do no arithmetic.

Quantizing stores the gradient's place, x, as the state; dequantizing stores the state in the weights' place.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["LOAD", "STORE", "Transfer"]


class Transfer(NamedTuple):
    """One of the two, under the attributes of a rule's form."""

    stem: str
    reads: bool
    writes: bool

    @property
    def choices(self) -> tuple[()]:
        return ()

    @property
    def states(self) -> tuple[tuple[str, bool], ...]:
        return (("x", False),)

    @property
    def name(self) -> str:
        return self.stem

    @property
    def width(self) -> int:
        return 1

    @property
    def source(self) -> str:
        return "kernels/transfer.cuh"


STORE, LOAD = Transfer("store_only", False, True), Transfer("load_only", True, False)
