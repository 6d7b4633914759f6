"""Rows of scalars that a device computes for itself: one small launch before those of the step (rows.cu).

For steps whose count, rate, loss scale or gradient norm only the device knows: nothing is read back. What the host does
know travels as arguments, and a CUDA graph that captures the launch repeats the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from inspect import signature
from typing import Any, NamedTuple, Protocol

import numpy as np

from refopt_cuda import rules
from refopt_cuda.kernels.build import OPTIONS, ROOT, functor
from refopt_cuda.kernels.step_cuda import ROWS, on_stream
from refopt_cuda.kernels.whole_rules import WHOLE

__all__ = [
    "BYTES",
    "COUNTS",
    "MUON",
    "PAIR",
    "PLAIN",
    "Factor",
    "Few",
    "Maker",
    "arguments",
    "each",
    "hypers",
    "room",
    "run",
    "source",
]

COUNTS = 64
"""Rows that one launch computes."""
BYTES = 80
"""A row: sixteen scalars, a word of random bits, and whether to skip."""
PAIR = 288
"""Two rows of a rule that sees whole tensors: sixteen scalars, eight of float64, and whether to skip, twice."""
THREADS = 256


class Maker(Protocol):
    """What rows are made for: a form of a rule, or `Few`."""

    @property
    def stem(self) -> str: ...

    @property
    def source(self) -> str: ...

    def __hash__(self) -> int: ...


class Few(NamedTuple):
    """Scalars of steps that are not one kernel's: a functor, the file that it is in, and its `Hypers` in order."""

    stem: str
    source: str
    names: tuple[str, ...]


PLAIN = Few("plain", "kernels/plain.cuh", ("lr",))
"""What gradients are multiplied by, and the rate: both float32."""
MUON = Few("muon", "kernels/muon.cuh", ("lr", "momentum", "wd", "factor"))


class Factor(NamedTuple):
    """What gradients are multiplied by: numbers, and device addresses (0: none) of what the host does not know.

    value     on the host; negative to climb is `maximize`, not here
    scale     address of the loss scale, float32: `value` over it
    inf       address of a float32; not 0 there: the step is without effect
    squares   address of the canonical sum of squares of each gradient, float64, and `measured`, how many
    longest   what the joint norm of the gradients, times the factor, is cut to if it is larger
    """

    value: float = 1.0
    scale: int = 0
    inf: int = 0
    squares: int = 0
    measured: int = 0
    longest: float = 0.0


def hypers(stem: str) -> tuple[str, ...]:
    """The rule's hyper-parameters in the order of its functor's `Hypers`."""
    names = signature((rules.RULES | WHOLE)[stem].scalars).parameters
    return tuple(name for name in names if name not in ("t", "vector", "gscale", "maximize"))


def each(form: Maker) -> int:
    """Bytes of what is made for one step count."""
    return PAIR if form.stem in WHOLE else BYTES


def room(count: int, form: Maker | None = None) -> int:
    """Bytes for the rows of this many step counts; launches read them in eights."""
    return -(-max(count, 1) // ROWS) * ROWS * (each(form) if form else BYTES)


def numbers(form: Maker, hyper: Mapping[str, Any]) -> list[float]:
    """A form's hyper-parameters as its functor takes them: of one of several words the place among them, NaN for what
    a rule of whole tensors is not given."""
    if isinstance(form, Few):
        return [float(hyper[name]) for name in form.names]
    words = getattr(WHOLE.get(form.stem), "VARIANTS", ())
    none = math.nan if form.stem in WHOLE else 0.0
    values = map(hyper.get, hypers(form.stem))
    return [none if v is None else float(words.index(v) if isinstance(v, str) else v) for v in values]


@cache
def source(form: Maker) -> str:
    """The whole text of the kernel of one rule; its entry is `refopt_rows`."""
    parts = ("kernels/arith.cuh", "kernels/random.cuh", form.source)
    texts = [(ROOT / part).read_text(encoding="utf-8").replace("#pragma once", "") for part in parts]
    name = form.stem if isinstance(form, Few) else getattr(form, "functor", None) or functor(form)
    texts += [
        f"#define WHOLE {int(form.stem in WHOLE)}",
        f"typedef {name} RULE;",
        (ROOT / "kernels/rows.cu").read_text(encoding="utf-8"),
    ]
    return "\n".join(texts)


def args_type() -> np.dtype:
    """The arguments, as rows.cu reads them."""
    fields: list[Any] = [(name, "u8") for name in ("rows", "rate", "scale", "inf", "wide_rate", "squares")]
    fields += [("hyper", "f8", (16,)), ("factor", "f8"), ("longest", "f8"), ("seed", "u8")]
    fields += [(name, "u4") for name in ("measured", "count", "maximize", "pad")]
    return np.dtype([*fields, ("counts", "u8", (COUNTS,)), ("steps", "i8", (COUNTS,))], align=True)


def arguments(
    form: Maker,
    hyper: Mapping[str, Any],
    counts: Sequence[tuple[int, int]],
    rows: int,
    factor: Factor,
    *,
    maximize: bool = False,
    seed: int = 0,
    rate: tuple[int, bool] = (0, False),
) -> np.ndarray:
    """One launch's arguments. `rate` is the address of a learning rate, and whether it is float64."""
    args = np.zeros(1, args_type())
    values = numbers(form, hyper)
    args["hyper"][0, : len(values)] = values
    args["rows"], args["wide_rate" if rate[1] else "rate"] = rows, rate[0]
    args["factor"], args["scale"], args["inf"], args["squares"], args["measured"], args["longest"] = factor
    args["seed"], args["maximize"], args["count"] = seed & (1 << 64) - 1, maximize, len(counts)
    args["counts"][0, : len(counts)] = [address for address, _ in counts]
    args["steps"][0, : len(counts)] = [step for _, step in counts]
    return args


@cache
def _compiled(form: Maker, device: int) -> Any:
    import cupy

    with cupy.cuda.Device(device):
        return cupy.RawModule(code=source(form), options=OPTIONS, backend="nvrtc").get_function("refopt_rows")


def run(
    form: Maker,
    hyper: Mapping[str, Any],
    counts: Sequence[tuple[int, int]],
    rows: int,
    factor: Factor,
    device: int,
    stream: int,
    **more: Any,
) -> None:
    """Compute a row for each count at the address `rows`, and count the steps.

    counts  (address of an int64 that holds the steps so far, 0) or (0, the step that is taken)
    more    `maximize`, `seed` and `rate` of `arguments`
    """
    function = _compiled(form, device)
    with on_stream(stream):
        for k in range(0, len(counts), COUNTS):
            some = counts[k : k + COUNTS]
            args = arguments(form, hyper, some, rows + k * each(form), factor, **more)
            function((1,), (THREADS,), (args.view(f"V{args.nbytes}"),))
