"""The text of the kernels of a rule that sees whole tensors: functor, `whole_walk.cuh`, `whole.cu`, an entry a pass."""

from __future__ import annotations

from dataclasses import dataclass

from refopt_cuda.kernels.build import NUMBERS, OPTIONS, ROOT
from refopt_cuda.kernels.whole_rules import Form

__all__ = ["OPTIONS", "Kernel", "entries", "source"]

RESIDENT = {"sums": 2, "finish": 4, "tiles": 2, "lines": 2, "means": 4, "update": 2}
"""Thread blocks of 256 that a multiprocessor holds: each pass's registers are limited to what they leave."""
MORE = {("lars", "update"): 3, ("adam_mini", "sums"): 3, ("adafactor", "tiles"): 3}
"""Passes that need fewer registers."""
NARROW = {("adafactor", "tiles"): 4}
"""Those that need fewer still where gradients have 16 bits."""


@dataclass(frozen=True)
class Kernel:
    """One kernel: a form of a rule, formats of weights and gradients, and a launch shape.

    live  whether scalars are read from the device's memory (kernels/rows.cu) instead of the arguments
    """

    rule: Form
    weight: str
    grad: str
    tensors: int = 64
    rows: int = 8
    live: bool = False

    def __post_init__(self) -> None:
        for number in (self.weight, self.grad):
            if number not in NUMBERS:
                raise ValueError(f"Kernel: no number format {number!r}; there are {', '.join(NUMBERS)}")


def resident(kernel: Kernel, entry: str) -> int:
    """Thread blocks of this entry that a multiprocessor holds at once."""
    known = RESIDENT | {e: n for (stem, e), n in MORE.items() if stem == kernel.rule.stem}
    if kernel.grad != "float32":
        known |= {e: n for (stem, e), n in NARROW.items() if stem == kernel.rule.stem}
    return known[entry[:-1]]


def entries(kernel: Kernel) -> str:
    """The kernels of a step, one a pass."""
    lines = (f"ENTRY({p[:-1]}, {p[-1]}, {resident(kernel, p)})" for p in kernel.rule.passes)
    return "\n".join([*lines, ""])


def functors(kernel: Kernel) -> str:
    """Arithmetic and the rule: plain C++ that g++ compiles as well."""
    parts = ("kernels/arith.cuh", "codecs/bf16.cuh", kernel.rule.source)
    return "\n".join(text(part) for part in parts)


def template(kernel: Kernel) -> str:
    """What follows the number formats: definitions, the passes, and an entry for each."""
    names = {"RULE": kernel.rule.functor, "WEIGHT": kernel.weight, "GRAD": kernel.grad}
    names |= {"TENSORS": str(kernel.tensors), "ROWS": str(kernel.rows), "LIVE": str(int(kernel.live))}
    defines = "\n".join(f"#define {name} {value}" for name, value in names.items())
    return "\n".join([defines, text("kernels/whole_walk.cuh"), text("kernels/whole.cu"), entries(kernel)])


def source(kernel: Kernel) -> str:
    """The whole text; its entries are named after the passes: `sums0`, `update0` ..."""
    return "\n".join([functors(kernel), text("kernels/access.cuh"), text("kernels/formats.cuh"), template(kernel)])


def text(path: str) -> str:
    """A file of this package."""
    return (ROOT / path).read_text(encoding="utf-8").replace("#pragma once", "")
