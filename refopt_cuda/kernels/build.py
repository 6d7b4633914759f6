"""The text of a raw kernel, put together from the functors of its rule and codecs and the template `step.cu`.

No driver and no CuPy is needed here: the same text is compiled on a GPU (`step_cuda.py`), by NVRTC without one
(tests), and its functors by g++ for the host (tests).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refopt_cuda import codecs as _codecs
from refopt_cuda import rules as _rules
from refopt_cuda.codecs import FROZEN, STATES, WEIGHTS
from refopt_cuda.kernels.transfer import Transfer

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("--std=c++17", "-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-lineinfo", "-default-device")
NUMBERS = ("float32", "bfloat16", "float16")
NOTHING = "nothing"
"""In place of a number format: no weights, or no gradients, are read or written."""
TILE = 256
"""Elements that a warp takes at once, eight a lane."""
BLOCKS = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Elements that may share a scale where a warp finds the largest; other sizes go element by element."""
PLANE = 65536
"""Bytes of 256 rows, in each of them 32 copies of two codecs' values."""


class Lookup(NamedTuple):
    """What the codecs of one kernel look up: all words, how many planes of values and words of encode tables they
    make in shared memory, and where each codec's values and words begin there, in bytes."""

    words: np.ndarray
    planes: int
    encode: int
    places: dict[_codecs.Form, tuple[int, int]]


@dataclass(frozen=True)
class Kernel:
    """One kernel: a form of a rule, of a codec for each state, formats of weights and gradients, and a launch shape.

    weight       a number format, or the form of a codec that keeps something beside bfloat16 words
    blocks       elements that share a scale, for each state
    live         whether scalars are read from the device's memory (kernels/rows.cu) instead of the arguments
    ragged       whether there are tensors whose blocks end with rows, wherever tiles do
    """

    rule: _rules.Form | Transfer
    codecs: tuple[_codecs.Form, ...]
    weight: str | _codecs.Form
    grad: str
    blocks: tuple[int, ...] = ()
    tensors: int = 64
    rows: int = 1
    live: bool = False
    ragged: bool = False

    @property
    def coded(self) -> bool:
        return any(form.scaled for form in self.codecs)

    @property
    def block(self) -> int:
        """The most elements that share a scale."""
        return max((b for b, form in zip(self.blocks, self.codecs, strict=True) if form.scaled), default=TILE)

    @property
    def quick(self) -> bool:
        """Whether blocks are such that a warp takes whole tiles."""
        return all(b in BLOCKS for b, form in zip(self.blocks, self.codecs, strict=True) if form.scaled)

    @property
    def tile(self) -> int:
        """Elements that a warp takes at once."""
        return TILE if self.quick else self.block

    @property
    def group(self) -> int:
        """Tiles that one block covers."""
        return max(self.block // TILE, 1) if self.quick and self.coded else 1

    @property
    def tiled(self) -> bool:
        """Whether all blocks lie in a tile, so that rows that are not whole blocks may be taken wherever tiles end."""
        return self.coded and self.quick and self.group == 1

    @property
    def threads(self) -> int:
        """Threads of the one block on a multiprocessor: 96 registers a thread, as much in flight as memory takes; 128
        where tiles of ragged rows keep three states until the next one."""
        return 512 if self.ragged and sum(form.scaled for form in self.codecs) > 2 else 640

    @cached_property
    def lookup(self) -> Lookup:
        return _lookup(tuple(dict.fromkeys(form for form in self.codecs if form.scaled)))

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.lookup.planes * PLANE + self.lookup.encode * 4

    def __post_init__(self) -> None:
        if not self.blocks:
            object.__setattr__(self, "blocks", (TILE,) * len(self.codecs))
        if len(self.blocks) != len(self.codecs):
            raise ValueError(f"Kernel: {len(self.blocks)} block sizes for {len(self.codecs)} codecs")
        if len(self.codecs) != len(self.rule.states):
            raise ValueError(f"Kernel: {len(self.codecs)} codecs for {self.rule.name}, which keeps {self.rule.states}")
        for form in self.codecs:
            if form.stem not in (STATES if isinstance(self.rule, _rules.Form) else {**STATES, **FROZEN}):
                raise ValueError(f"Kernel: no codec {form.stem!r} for a state; there are {', '.join(STATES)}")
        if not (self.weight in (*NUMBERS, NOTHING) if isinstance(self.weight, str) else self.weight.stem in WEIGHTS):
            raise ValueError(
                f"Kernel: no format {self.weight!r} of weights; there are {', '.join([*NUMBERS, *WEIGHTS])}"
            )
        if self.grad not in (*NUMBERS, NOTHING):
            raise ValueError(f"Kernel: no number format {self.grad!r}; there are {', '.join(NUMBERS)}")


@cache
def _lookup(forms: tuple[_codecs.Form, ...]) -> Lookup:
    columns: list[np.ndarray] = []
    encode: list[np.ndarray] = []
    places: dict[_codecs.Form, tuple[int, int]] = {}
    tables = {form: form.module.tables(**form.options) for form in forms}
    planes = -(-sum(values.size > 0 for values, _ in tables.values()) // 2)
    for form, (values, words) in tables.items():
        plane, side = divmod(len(columns), 2)
        places[form] = plane * PLANE + side * 128, planes * PLANE + 4 * sum(w.size for w in encode)
        if values.size:
            columns.append(np.pad(values.view(np.uint32), (0, 256 - values.size)))
        encode.append(words)
    columns += [np.zeros(256, np.uint32)] * (2 * planes - len(columns))
    count = sum(w.size for w in encode)
    return Lookup(np.concatenate([np.zeros(0, np.uint32), *columns, *encode]), planes, count, places)


@cache
def _text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8").replace("#pragma once", "")


def functor(form: Any) -> str:
    """The C++ name of a rule's or codec's form: its choices are the template's arguments."""
    words = [str(c).lower() if isinstance(c, bool) else str(c).upper() for c in form.choices]
    return f"{form.stem}<{', '.join(words)}>" if words else form.stem


def functors(rule: Any, codecs: tuple[str, ...]) -> str:
    """Arithmetic, codecs and the rule: plain C++ that g++ compiles as well."""
    shared = ["codecs/nibbles.cuh"] if any(getattr(_codecs.CODECS[stem], "BITS", 0) == 4 for stem in codecs) else []
    parts = ["kernels/arith.cuh", "kernels/random.cuh", *shared, *(f"codecs/{stem}.cuh" for stem in codecs)]
    return "\n".join(_text(part) for part in [*parts, rule.source])


def shift(block: int) -> int:
    """log2 of the lanes that a block takes, eight elements each."""
    return max((block // 8).bit_length() - 1, 0)


def state(kernel: Kernel, form: _codecs.Form, block: int) -> str:
    """A state's codec, the lanes that share a scale, and where its tables lie."""
    values, words = kernel.lookup.places.get(form, (0, 0))
    return f"State<{functor(form)}, {shift(block)}, {values}, {words}>"


def weight(kernel: Kernel) -> str:
    """The C++ name of the format of the weights."""
    return f"Number<{kernel.weight}>" if isinstance(kernel.weight, str) else f"Words<{functor(kernel.weight)}>"


def source(kernel: Kernel) -> str:
    """The whole text of one kernel; its entry is `refopt_step`."""
    forms = [*kernel.codecs, *([kernel.weight] if not isinstance(kernel.weight, str) else [])]
    stems = tuple(dict.fromkeys(["bf16", *(form.stem for form in forms)]))
    names = {
        "RULE": functor(kernel.rule),
        "CODECS": ", ".join(map(partial(state, kernel), kernel.codecs, kernel.blocks)),
        "WEIGHT": weight(kernel),
        "GRAD": kernel.grad,
        "TILE": kernel.tile,
        "GROUP": kernel.group,
        "THREADS": kernel.threads,
        "TENSORS": kernel.tensors,
        "ROWS": kernel.rows,
        "LIVE": int(kernel.live),
        "PLANES": kernel.lookup.planes,
        "ENCODE": kernel.lookup.encode,
        "AHEAD": int(kernel.coded),
        "RAGGED": int(kernel.ragged),
        "READS": int(getattr(kernel.rule, "reads", True)),
        "WRITES": int(getattr(kernel.rule, "writes", True)),
    }
    defines = "\n".join(f"#define {name} {value}" for name, value in names.items())
    ragged = ["step_lone.cuh", "step_ragged.cuh"] if kernel.ragged else []
    parts = ["access.cuh", "formats.cuh", "states.cuh", "step_walk.cuh", *ragged, "step.cu"]
    template = (_text(f"kernels/{part}") for part in parts)
    return "\n".join([functors(kernel.rule, stems), defines, *template])
