"""Rules that see whole tensors as raw CUDA: a few launches a step, each over any number of tensors.

As `step_cuda` it knows pointers and shapes, not arrays. What stays between steps (parameters, states, scratch) is a
table on the device; gradients and scalars travel as kernel arguments, and what is made of a tensor's sums stays on the
device, so a step copies nothing and waits for nothing. The scratch is small: 16 bytes a row or a chunk of 65536
elements, and for factored rules 8 bytes for every row and column of a tile of 256 x 256.

Bytes that the passes move for each weight, P bytes long, of a matrix, with gradients of G bytes (small terms left out):

LAMB                 sums P + G + 8, update 2 P + G + 16              3 P + 2 G + 24
LARS                 sums P + G, update 2 P + G + 8                   3 P + 2 G + 8    variant clip: 4 more
Adafactor            tiles G, sums P + G, update 2 P + G              3 P + 3 G        with beta1: 8 more
                                                                      without scale_parameter: P less
CAME                 tiles G, sums G, tiles G + 4, update 2 P + G + 8 2 P + 4 G + 12
Adam-mini            sums G, update 2 P + G + 8                       2 P + 2 G + 8
Adam-mini, elements  update 2 P + G + 16                              2 P + G + 16
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from refopt_cuda.kernels import whole_build as build
from refopt_cuda.kernels.step_cuda import ROWS, SIZES, SKIP, on_stream
from refopt_cuda.kernels.whole_cut import Cut
from refopt_cuda.kernels.whole_rules import Form, Rows

__all__ = ["ROWS", "SIZES", "SKIP", "Tensor", "Whole"]

THREADS, WARPS = 256, 8
KINDS = ("pieces", "blocks", "tiles", "lines", "matrices")
"""What passes count in, in the order of the enumeration in whole.cu."""
COUNTED = {"sums": 0, "update": 0, "finish": 1, "tiles": 2, "lines": 3, "means": 4}
BY_WARP = ("sums", "update", "lines")
MOST = 2**31
"""Items of a pass that one launch numbers."""


class Tensor(NamedTuple):
    """One parameter: device addresses of p and of its float32 states by name, and its shape."""

    p: int
    states: Mapping[str, int]
    shape: tuple[int, ...]


class Device(Protocol):
    """What a launcher needs of a device."""

    def upload(self, array: np.ndarray) -> Any:
        """A copy of an array; hold on to it as long as it is used."""

    def allocate(self, count: int) -> Any:
        """This many bytes."""

    def address(self, held: Any) -> int:
        """Where that lies."""

    def launcher(self, kernel: build.Kernel) -> Callable[[str, int, Any, int], None]:
        """`launch(entry, items, arguments, stream)` of a compiled kernel."""


class Cuda:
    """The current device through CuPy."""

    def __init__(self) -> None:
        try:
            import cupy
        except ImportError as error:
            raise ImportError(
                "refopt_cuda: CUDA tensors need CuPy, which is not installed: pip install 'refopt[cuda13]' (or cuda12)"
            ) from error
        self.cupy = cupy

    def upload(self, array: np.ndarray) -> Any:
        return self.cupy.asarray(array.view(np.uint8))

    def allocate(self, count: int) -> Any:
        return self.cupy.empty(count, self.cupy.uint8)

    def address(self, held: Any) -> int:
        return held.data.ptr

    def launcher(self, kernel: build.Kernel) -> Callable[[str, int, Any, int], None]:
        functions, processors = _compiled(kernel, self.cupy.cuda.Device().id)

        def launch(entry: str, items: int, arguments: Any, stream: int) -> None:
            grid = min(processors * build.resident(kernel, entry), items)
            with on_stream(stream):
                functions[entry]((grid,), (THREADS,), (arguments,))

        return launch


@cache
def _compiled(kernel: build.Kernel, device: int) -> tuple[dict[str, Any], int]:
    """The kernels on this device, and how many multiprocessors it has."""
    import cupy

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=build.source(kernel), options=build.OPTIONS, backend="nvrtc")
        functions = {entry: module.get_function(entry) for entry in kernel.rule.passes}
        return functions, cupy.cuda.runtime.getDeviceProperties(device)["multiProcessorCount"]


class Whole:
    """The passes of one rule for tensors of equal number formats; `bind` them once, `run` them every step.

    rule     a form of `refopt_cuda.kernels.whole_rules`
    hyper    hyper-parameters that decide how tensors are cut: `blocks` and `heads` of Adam-mini
    p_dtype  "float32", "bfloat16" or "float16"; g_dtype likewise
    """

    def __init__(
        self, rule: Form, hyper: Mapping[str, Any], p_dtype: str, g_dtype: str, device: Device | None = None
    ) -> None:
        self.form, self.hyper = rule, dict(hyper)
        self.p_dtype, self.g_dtype = p_dtype, g_dtype
        self.device, self.count = device, 0
        build.Kernel(rule, p_dtype, g_dtype)

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Fix the parameters and states that the passes work on (current device), and allocate the scratch."""
        if not 0 < len(tensors) <= SIZES[-1]:
            raise ValueError(f"Whole.bind: 1 to {SIZES[-1]} tensors fit a launch, got {len(tensors)}")
        device = self.device or Cuda()
        cuts = [Cut.of(self.form, t.shape, self.hyper) for t in tensors]
        totals = [sum(getattr(cut, kind) for cut in cuts) for kind in KINDS]
        if max(totals) >= MOST or any(cut.n >= 2**35 for cut in cuts):
            raise ValueError(f"Whole.bind: {max(totals)} rows or tiles, or a tensor of 2^35 elements, are too many")
        scratch = [Scratch.of(self.form, cut) for cut in cuts]
        self.scratch = device.allocate(max(sum(s.size for s in scratch), 16))
        table = self._table(tensors, cuts, scratch, device.address(self.scratch))
        self.table, self.count = device.upload(table), len(tensors)
        size = next(s for s in SIZES if s >= len(tensors))
        self.kernel = build.Kernel(self.form, self.p_dtype, self.g_dtype, size)
        self.ways: dict[bool, tuple[Any, Any]] = {}
        self.items = {p: totals[COUNTED[p[:-1]]] for p in self.form.passes}

    def _table(self, tensors: Sequence[Tensor], cuts: Sequence[Cut], scratch: Sequence[Scratch], at: int) -> np.ndarray:
        table = np.zeros(len(tensors) + 1, tensor_type(self.form))
        first = np.zeros(len(KINDS), np.int64)
        for entry, t, cut, small in zip(table, tensors, cuts, scratch, strict=False):
            entry["first"], entry["p"] = first, t.p
            entry["x"] = [t.states.get(name, 0) for name in self.form.elements]
            entry["f"][: len(self.form.factors)] = [t.states.get(name, 0) for name in self.form.factors]
            for name in ("n", "block", "piece", "per", "matrices", "rows", "columns", "across", "down", "by_row"):
                entry[name] = getattr(cut, name)
            for name, offset in small.offsets.items():
                entry[name] = at + offset
            entry["aligned"] = cut.even and all(a % 16 == 0 for a in (t.p, *entry["x"].tolist()))
            first += [getattr(cut, kind) if kind != "blocks" or cut.per > 1 else 0 for kind in KINDS]
            at += small.size
        table["first"][-1] = first
        return table

    def run(self, grads: Sequence[int], rows: Sequence[Rows], which: Sequence[int] | None, stream: int) -> None:
        """Enqueue one step on `stream` (a cudaStream_t).

        grads  the device address of each tensor's gradient, at any alignment; `SKIP` leaves that tensor alone
        rows   `refopt_cuda.kernels.whole_rules.rows`, at most `ROWS`
        which  each tensor's row; None where there is one
        """
        if len(grads) != self.count or not 0 < len(rows) <= ROWS:
            raise ValueError(f"Whole.run: {len(grads)} gradients for {self.count} tensors, {len(rows)} rows of scalars")
        launch, args = self._way()
        for k, row in enumerate(rows):
            args["scalars"][0, k, : row.scalars.size], args["wide"][0, k, : row.wide.size] = row
        self._launch(launch, args, grads, which, stream)

    def run_live(self, grads: Sequence[int], rows: int, which: Sequence[int], stream: int) -> None:
        """The same with `ROWS` rows that `rows_cuda.run` has left at the address `rows`: two of each step count."""
        if len(grads) != self.count:
            raise ValueError(f"Whole.run_live: {len(grads)} gradients for {self.count} tensors")
        launch, args = self._way(live=True)
        args["live"] = rows
        self._launch(launch, args, grads, which, stream)

    def _way(self, live: bool = False) -> tuple[Any, Any]:
        """The kernels, compiled when they are first needed, and their arguments."""
        if live not in self.ways:
            device, kernel = self.device or Cuda(), replace(self.kernel, live=live)
            args = np.zeros(1, args_type(kernel.tensors, live))
            args["tensors"], args["count"] = device.address(self.table), self.count
            self.ways[live] = device.launcher(kernel), args
        return self.ways[live]

    def _launch(self, launch: Any, args: Any, grads: Sequence[int], which: Any, stream: int) -> None:
        args["g"][0, : self.count] = grads
        args["which"][0, : self.count] = 0 if which is None else which
        for entry, items in self.items.items():
            if items:
                warps = WARPS if entry[:-1] in BY_WARP else 1
                launch(entry, -(-items // warps), args, stream)


@dataclass(frozen=True)
class Scratch:
    """Where a tensor's share of the scratch lies, by the name in whole.cu's Tensor, and how long it is."""

    offsets: dict[str, int]
    size: int

    @classmethod
    def of(cls, form: Form, cut: Cut) -> Scratch:
        pairs = len(form.factors) // 2 if form.factored else 0
        sizes = {
            "sums": 8 * form.sums * cut.pieces,
            "lines": 8 * cut.partials,
            "k": 16 * cut.blocks,
            "roots": 4 * pairs * cut.matrices * cut.columns,
            "means": 4 * pairs * cut.matrices,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name], at = at, at + -(-size // 16) * 16
        return cls(offsets, at)


def tensor_type(form: Form) -> np.dtype:
    """The record of one tensor, as whole.cu reads it."""
    pairs = max(len(form.factors) // 2, 1)
    words = ("per", "aligned", "matrices", "rows", "columns", "across", "down", "by_row")
    fields: list[Any] = [("p", "u8"), ("x", "u8", (len(form.elements),)), ("f", "u8", (2 * pairs,))]
    fields += [(name, "u8") for name in ("sums", "lines", "k", "roots", "means")]
    fields += [(name, "i8") for name in ("n", "block", "piece")] + [(name, "u4") for name in words]
    fields += [("first", "u4", (len(KINDS),))]
    bare: Any = np.dtype(fields, align=True)
    formats, offsets = zip(*(bare.fields[name][:2] for name in bare.names), strict=True)
    size = -(-bare.itemsize // 16) * 16
    return np.dtype({"names": bare.names, "formats": formats, "offsets": offsets, "itemsize": size})


def args_type(size: int, live: bool = False) -> np.dtype:
    """The arguments of a launch for at most `size` tensors, as whole.cu reads them."""
    fields: list[Any] = [("tensors", "u8"), ("count", "u4")]
    fields += [("live", "u8")] if live else [("wide", "f8", (ROWS, 8)), ("scalars", "f4", (ROWS, 16))]
    return np.dtype([*fields, ("which", "u1", (size,)), ("g", "u8", (size,))], align=True)
