"""The raw CUDA kernels behind CuPy: one `Launch` is one kernel launch over any number of tensors.

A launch knows pointers and shapes, not arrays: it serves torch, CuPy or anything else that can name a device address.
What stays between steps (parameters and states) is a table on the device; what changes each step (gradients and
scalars) travels as kernel arguments, so a step copies nothing and waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar, NamedTuple

import numpy as np

from refopt_cuda import rules
from refopt_cuda.codecs import WEIGHTS, Form, named
from refopt_cuda.kernels import build
from refopt_cuda.kernels.transfer import Transfer

SIZES = (64, 512, 3072)
"""Kernels are compiled for at most this many tensors a launch; arguments of up to 32 KiB need CUDA 12.1 or newer."""
ROWS = 8
"""Different rows of scalars (step counts) that one launch can hold."""
UNIT = 8
"""Tiles that a warp takes at a time, a unit; where units are cut, as many pieces."""
LONGEST = 16
"""The most tiles of ragged rows in a piece, and an eighth of those in a unit: a warp steps one tile more."""

SKIP = 1
"""In place of a gradient's address: leave this tensor alone."""


class Tensor(NamedTuple):
    """One parameter: device addresses of p, of (codes, scales) of each state (scales 0 if none) and of what lies
    beside p (0 if nothing does), its shape, its number among the parameters, which random bits are drawn by, and, of a
    piece of a tensor, the number of its first element there."""

    p: int
    states: tuple[tuple[int, int], ...]
    shape: tuple[int, ...]
    rest: int = 0
    number: int = 0
    first: int = 0


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise ImportError(
            "refopt_cuda: CUDA tensors need CuPy, which is not installed: pip install 'refopt[cuda13]' (or cuda12)"
        ) from error
    return cupy


@cache
def _tables(kernel: build.Kernel, device: int) -> Any:
    """What the kernel's codecs look up, on a device, as 32-bit words."""
    cupy = _cupy()
    with cupy.cuda.Device(device), cupy.cuda.Stream(non_blocking=True) as stream:
        table = cupy.asarray(kernel.lookup.words if kernel.shared else np.zeros(1, np.uint32))
        stream.synchronize()  # launches on any stream read it; none of them is waited for
    return table


@cache
def _compiled(kernel: build.Kernel, device: int) -> tuple[Any, int]:
    """The function on this device and the number of thread blocks that fill it."""
    cupy = _cupy()
    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=build.source(kernel), options=build.OPTIONS, backend="nvrtc")
        function = module.get_function("refopt_step")
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        room = properties["sharedMemPerBlockOptin"]
        if kernel.shared > room:
            raise RuntimeError(
                f"refopt_cuda: {_coded(kernel)} keeps {kernel.shared} bytes of tables in shared memory, "
                f"{properties['name'].decode()} has {room} a block: take another codec (int8_linear, bf16, f32)"
            )
        if kernel.shared:
            function.max_dynamic_shared_size_bytes = kernel.shared
        count = properties["multiProcessorCount"]
    return function, count


@cache
def on_stream(handle: int) -> Any:
    """CuPy's view of a stream that another library owns."""
    cuda = _cupy().cuda
    if not hasattr(cuda.Stream, "from_external"):
        return cuda.ExternalStream(handle)
    foreign = type("Foreign", (), {"__cuda_stream__": lambda self: (0, handle)})
    return cuda.Stream.from_external(foreign())


def _coded(kernel: build.Kernel) -> str:
    return " with ".join(dict.fromkeys(form.stem for form in kernel.codecs if form.scaled))


class Launch:
    """One kernel for tensors of equal number formats and codecs; `bind` them once, `run` it every step.

    rule     a form of `refopt_cuda.rules`, or a stem: its plainest form with as many states as codecs
    codecs   a codec for each state in the rule's order: a form, or its name ("dynamic8", "fp8.e5m2")
    weight   "float32", "bfloat16", "float16", or a format of weights that keeps something beside bfloat16 words
    g_dtype  "float32", "bfloat16" or "float16"
    block    elements that share a scale, one for all states or one a state; powers of two from 16 to 2048 are fast,
             others go element by element. Each must divide the largest.
    """

    def __init__(
        self,
        rule: str | rules.Form | Transfer,
        codecs: Sequence[str | Form],
        weight: str | Form,
        g_dtype: str,
        block: int | Sequence[int] = 256,
    ) -> None:
        form = rule if isinstance(rule, Transfer) else rules.named(rule, len(codecs))
        if form is None:
            raise ValueError(f"Launch: {rule} does not keep {len(codecs)} states, got codecs {codecs}")
        self.form = form
        self.codecs = tuple(
            named(c, never) if isinstance(c, str) else c for c, (_, never) in zip(codecs, form.states, strict=True)
        )
        self.weight = named(weight) if isinstance(weight, str) and weight.partition(".")[0] in WEIGHTS else weight
        self.blocks = tuple(block) if isinstance(block, Sequence) else (block,) * len(codecs)
        scaled = [b for b, c in zip(self.blocks, self.codecs, strict=True) if c.scaled]
        self.block = max(scaled, default=256)
        if any(b < 1 or self.block % b for b in scaled):
            raise ValueError(f"Launch: block sizes {self.blocks} must each divide the largest")
        if any(b % 2 and c.module.BITS == 4 for b, c in zip(self.blocks, self.codecs, strict=True) if c.scaled):
            raise ValueError(f"Launch: blocks of 4-bit codes must be even, got {self.blocks}")
        self.g_dtype, self.scalars = g_dtype, form.width
        self.count = self.units = 0
        self._kernel(SIZES[0])

    def bind(self, tensors: Sequence[Tensor]) -> None:
        """Fix the parameters and states that the launch works on (current device): ~100 bytes a tensor are copied."""
        cupy = _cupy()
        if not 0 < len(tensors) <= SIZES[-1]:
            raise ValueError(f"Launch.bind: 1 to {SIZES[-1]} tensors fit a launch, got {len(tensors)}")
        self.device = cupy.cuda.Device().id
        self.size = next(s for s in SIZES if s >= len(tensors))
        table, self.units, self.ragged = self._table(tensors)
        self.count, self.bound = len(tensors), tuple(tensors)
        self.table = cupy.asarray(table.view(np.uint8))
        self.ways: dict[tuple[int, bool], tuple[Any, ...]] = {}

    def _way(self, rows: int, live: bool = False) -> tuple[Any, ...]:
        """(grid, threads, function, shared bytes, arguments, their bytes) of a kernel for so many rows of scalars."""
        if (rows, live) not in self.ways:
            kernel = replace(self._kernel(self.size, rows), live=live, ragged=self.ragged)
            function, grid = _compiled(kernel, self.device)
            args = np.zeros(1, self._args_type(self.size, rows, live))
            self.lookup = _tables(replace(kernel, tensors=SIZES[0], rows=1, live=False, ragged=False), self.device)
            args["tensors"], args["tables"] = self.table.data.ptr, self.lookup.data.ptr
            args["units"], args["count"] = self.units, self.count
            grid = min(grid, -(-self.units * UNIT // (kernel.threads // 32)))
            words = args.view(f"V{args.nbytes}")  # the same memory: CuPy would describe its fields in every launch
            self.ways[rows, live] = ((grid,), (kernel.threads,), function, kernel.shared, args, words)
        return self.ways[rows, live]

    def _kernel(self, tensors: int, rows: int = 1) -> build.Kernel:
        return build.Kernel(self.form, self.codecs, self.weight, self.g_dtype, self.blocks, tensors, rows)

    @staticmethod
    def _args_type(size: int, rows: int, live: bool = False) -> np.dtype:
        fields: list[Any] = [("tensors", "u8"), ("tables", "u8"), ("units", "u4"), ("count", "u4")]
        fields += [("live", "u8")] if live else [("scalars", "f4", (rows, 16)), ("random", "u8", (rows,))]
        return np.dtype([*fields, ("which", "u1", (size,)), ("g", "u8", (size,))], align=True)

    def _table(self, tensors: Sequence[Tensor]) -> tuple[np.ndarray, int, bool]:
        """The words of all tensors, the number of their units, and whether there are ragged ones."""
        kept = max(len(self.codecs), 1)
        slot = np.dtype([("codes", "u8"), ("scales", "u8"), *((name, "u4") for name in Layout.SLOT)])
        head = [("first", "u4"), ("whole", "u4"), ("per", "u4"), ("aligned", "u4"), ("p", "u8"), ("rest", "u8")]
        tail = [("row", "i8"), ("n", "i8"), ("tiles", "u4"), ("number", "u4"), ("piece", "u4"), ("blank", "u4")]
        tail += [("start", "i8"), ("unused", "i8")]
        table = np.zeros(len(tensors) + 1, np.dtype([*head, *tail, ("states", slot, (kept,))]))
        first, kernel = 0, self._kernel(SIZES[0])
        drawn = not isinstance(kernel.weight, str) and kernel.weight.module.RANDOM
        layouts = [Layout.of(kernel, self.blocks, t.shape) for t in tensors]
        ragged = piece(sum(layout.tiles for layout in layouts))
        for entry, t, layout in zip(table, tensors, layouts, strict=False):
            entry["piece"] = ragged if layout.ragged else kernel.group
            units = -(-layout.tiles // (UNIT // kernel.group * int(entry["piece"])))
            if first + units >= 2**29:
                raise ValueError(f"Launch.bind: {first + units} units; at most 2^29 - 1 fit a launch")
            entry["first"], entry["p"], entry["rest"] = first, t.p, t.rest
            entry["number"], entry["start"] = t.number, t.first
            for name in ("per", "row", "n", "tiles"):
                entry[name] = getattr(layout, name)
            for kept_at, state, slot_at in zip(entry["states"], t.states, layout.slots, strict=False):
                kept_at["codes"], kept_at["scales"] = state
                for name, value in zip(Layout.SLOT, slot_at, strict=True):
                    kept_at[name] = value
            aligned = all(a % 16 == 0 for a in (t.p, t.rest, *(codes for codes, _ in t.states)))
            aligned &= not (drawn and t.first % 4)
            entry["aligned"] = (aligned and layout.row % 8 == 0) + 2 * (aligned and layout.easy) + 4 * layout.ragged
            one_row = kernel.quick and not layout.row
            entry["whole"] = layout.n // build.TILE if one_row and aligned else 0
            first += units
        table["first"][-1] = first
        return table, first, any(layout.ragged for layout in layouts)

    def run(
        self,
        grads: Sequence[int],
        scalars: np.ndarray,
        which: Sequence[int] | None,
        stream: int,
        random: Sequence[int] | None = None,
    ) -> None:
        """Enqueue one step on `stream` (a cudaStream_t).

        grads    the device address of each tensor's gradient, at any alignment; `SKIP` leaves that tensor alone
        scalars  float32 (rows, len(SCALARS)), at most `ROWS` rows
        which    each tensor's row; None where there is one
        random   the step's word of random bits for each row (`refopt_cuda.random.step_word`), if the weights draw any
        """
        rows, width = scalars.shape
        if rows > ROWS or width != self.scalars or len(grads) != self.count:
            raise ValueError(f"Launch.run: {len(grads)} gradients for {self.count} tensors, scalars {scalars.shape}")
        if not self.units:
            return
        grid, threads, function, shared, args, words = self._way(1 if rows == 1 else ROWS)
        self._fill(args, grads, scalars, which, random)
        with on_stream(stream):
            function(grid, threads, (words,), shared_mem=shared)

    def _fill(self, args: np.ndarray, grads: Any, scalars: np.ndarray, which: Any, random: Any) -> None:
        """What changes with every step, as `run` is given it."""
        rows, width = scalars.shape
        args["scalars"][0, :rows, :width] = scalars
        args["g"][0, : self.count] = grads
        if which is not None:
            args["which"][0, : self.count] = which
        if random is not None:
            args["random"][0, :rows] = random

    def run_live(self, grads: Sequence[int], rows: int, which: Sequence[int] | None, stream: int) -> None:
        """The same with scalars that `rows_cuda.run` has left at the address `rows`: one row, or with `which` eight."""
        if len(grads) != self.count:
            raise ValueError(f"Launch.run_live: {len(grads)} gradients for {self.count} tensors")
        if not self.units:
            return
        grid, threads, function, shared, args, words = self._way(1 if which is None else ROWS, live=True)
        args["live"], args["g"][0, : self.count] = rows, grads
        if which is not None:
            args["which"][0, : self.count] = which
        with on_stream(stream):
            function(grid, threads, (words,), shared_mem=shared)


def piece(tiles: int) -> int:
    """Tiles of ragged rows in a piece, in a launch over so many: there must be several units for every warp."""
    return min(LONGEST, 1 << max(tiles // 50_000, 1).bit_length() - 1)


@dataclass(frozen=True)
class Layout:
    """How a tensor is cut into tiles, and how each state's blocks lie in them.

    n, row       elements in all, and a row of the block layout
    per, tiles   tiles a row where each begins with one (else 0), and in all
    slots        of each state: log2 of the lanes that share a scale, scales a row (0: one row), elements that share a
                 scale, bytes of codes a row
    easy         whether tiles and blocks lie as the kernel was compiled for: one row, and no shorter blocks
    ragged       whether blocks end with rows, wherever tiles do
    """

    n: int
    row: int
    per: int
    tiles: int
    slots: tuple[tuple[int, int, int, int], ...]
    easy: bool = False
    ragged: bool = False

    SLOT: ClassVar[tuple[str, ...]] = ("shift", "per", "block", "bytes")

    @classmethod
    def of(cls, kernel: build.Kernel, blocks: tuple[int, ...], shape: tuple[int, ...]) -> Layout:
        """Rows of at least 16 elements are cut one by one, so that no block leaves its row."""
        n = math.prod(shape)
        if n >= 2**35:
            raise ValueError(f"Launch.bind: a tensor has {n} elements; at most 2^35 - 1 are addressed")
        row = shape[-1] if kernel.coded and len(shape) >= 2 and shape[-1] >= 16 else n
        shift = build.shift if kernel.quick else (lambda b: 0)
        used = [b for b, form in zip(blocks, kernel.codecs, strict=True) if form.scaled]
        short = kernel.quick and row & (row - 1) == 0  # a power of two: shorter blocks serve as well as rows
        if n == 0 or row == n or short or all(row % b == 0 for b in used):
            cut = [min(b, row) if short and row < n else b for b in blocks]
            slots = tuple((shift(b), 0, b, 0) for b in cut)
            easy = kernel.quick and all(a == b for a, b, f in zip(cut, blocks, kernel.codecs, strict=True) if f.scaled)
            return cls(n, 0, 0, -(-n // kernel.tile), slots, easy)
        if row > 2**31:
            raise ValueError(f"Launch.bind: rows of {row} elements; at most 2^31, or whole blocks, are addressed")
        bytes_ = [row // b * -(-b // 2) + -(-(row % b) // 2) for b in blocks]
        slots = tuple((shift(b), -(-row // b), b, size) for b, size in zip(blocks, bytes_, strict=True))
        if kernel.tiled:
            if n > 2**35 - 512:  # tiles behind the last element are counted as well
                raise ValueError(f"Launch.bind: {n} elements in ragged rows; at most 2^35 - 512 are addressed")
            return cls(n, row, 0, -(-n // build.TILE), slots, ragged=True)
        per = -(-row // (kernel.tile * kernel.group)) * kernel.group
        return cls(n, row, per, n // row * per, slots)
