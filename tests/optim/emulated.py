"""A CUDA device that is none: tensors of the CPU that say they are on one, and launches that step them on the host.

What is tried is all that stands between an optimizer and its launches. What the kernels do is tried elsewhere: rows of
scalars come from the host's functions, sums of squares from the oracle.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from refopt.codecs.blocks import bounds
from refopt.reduce import squares, total
from refopt_cuda import rules
from refopt_cuda.kernels import (
    arguments,
    muon,
    norm,
    quantize_cuda,
    quantize_host,
    rows_cuda,
    step_cuda,
    step_host,
    transfer,
    whole_cuda,
    whole_host,
    whole_rules,
)
from refopt_cuda.kernels.whole_cut import Cut
from refopt_cuda.optim import checks, whole_launch
from refopt_cuda.random import step_word


class There(torch.nn.Parameter):
    """A tensor that says it is on a CUDA device."""

    is_cuda = property(lambda self: True)


def there(x: torch.Tensor, grad: bool = False) -> Any:
    return There(x.detach().clone(), requires_grad=grad)


def view(address: int, count: int, dtype: Any) -> np.ndarray:
    """Memory at an address."""
    size = count * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype) if size else np.zeros(0, dtype)


class Launch:
    """`step_cuda.Launch` over float32 weights and gradients."""

    made: ClassVar[list[Launch]] = []

    def __init__(self, form: Any, codecs: Sequence[Any], weight: Any, g_dtype: str, blocks: Sequence[int]) -> None:
        assert (weight, g_dtype) == ("float32", "float32")
        self.form, self.codecs, self.blocks = form, tuple(codecs), tuple(blocks)
        self.binds, self.runs, self.table = 0, 0, object()
        self.made.append(self)

    def bind(self, tensors: Sequence[step_cuda.Tensor]) -> None:
        self.tensors, self.table, self.binds = list(tensors), object(), self.binds + 1

    def run(self, grads: Any, scalars: np.ndarray, which: Any, stream: int, random: Any) -> None:
        assert len(grads) == len(self.tensors)
        self.runs += 1
        for k, (t, g) in enumerate(zip(self.tensors, grads, strict=True)):
            if g != step_cuda.SKIP:
                row = 0 if which is None else which[k]
                self._step(t, g, scalars[row], int(random[row]))

    def run_live(self, grads: Any, rows: int, which: Any, stream: int) -> None:
        count = 1 if which is None else step_cuda.ROWS
        words = view(rows, count * rows_cuda.BYTES, np.uint8).reshape(count, -1)
        skip = words[:, 72:].view(np.uint64)[:, 0]
        width = len(rules.RULES[self.form.stem].SCALARS)
        if not skip[0]:
            self.run(
                grads,
                words[:, :64].copy().view(np.float32)[:, :width],
                which,
                stream,
                words[:, 64:72].copy().view("u8")[:, 0],
            )

    def _step(self, t: step_cuda.Tensor, g: int, row: np.ndarray, random: int) -> None:
        cut = arguments.cut(self.codecs, t.shape, self.blocks)
        kept = []
        for codec, (codes, scales), (n, blocks) in zip(self.codecs, t.states, cut.counts, strict=True):
            entry = {"codes": view(codes, n, np.uint8 if codec.scaled else np.float32)}
            kept.append(entry | ({"scales": view(scales, blocks, np.float32)} if codec.scaled else {}))
        p, grad = (view(a, cut.size, np.float32) for a in (t.p, g))
        step_host.step(self.form, self.codecs, p, grad, kept, t.shape, self.blocks, np.ascontiguousarray(row))


class Carrier:
    """`step_cuda.Launch` of `quantize_cuda`: between float32 and codes."""

    def __init__(self, form: Any, codecs: Sequence[Any], weight: str, g_dtype: str, block: int) -> None:
        self.form, (self.codec,), self.block, self.table = form, codecs, block, None

    def bind(self, tensors: Sequence[step_cuda.Tensor]) -> None:
        (self.tensor,), self.table = tensors, object()

    def run(self, grads: Sequence[int], scalars: np.ndarray, which: Any, stream: int) -> None:
        (codes, scales), shape = self.tensor.states[0], self.tensor.shape
        cut = arguments.cut((self.codec,), shape, (self.block,))
        (count, parts), form = cut.counts[0], self.codec
        kept = view(codes, count, form.module.dtype(**form.options))
        beside = view(scales, parts, form.module.scale_dtype(**form.options))
        cuts = bounds(shape, self.block, None)
        if self.form is transfer.STORE:
            quantize_host.quantize(form, view(grads[0], cut.size, np.float32), cuts, kept, beside)
        else:
            quantize_host.dequantize(form, kept, beside, cuts, view(self.tensor.p, cut.size, np.float32))


class Whole:
    """`whole_cuda.Whole` over float32 weights and gradients."""

    def __init__(self, form: Any, hyper: Any, p_dtype: str, g_dtype: str) -> None:
        assert (p_dtype, g_dtype) == ("float32", "float32")
        self.form, self.hyper, self.table, self.scratch = form, dict(hyper), object(), object()

    def bind(self, tensors: Sequence[whole_cuda.Tensor]) -> None:
        self.tensors = list(tensors)

    def run(self, grads: Any, rows: Sequence[whole_rules.Rows], which: Any, stream: int) -> None:
        for t, g, k in zip(self.tensors, grads, which, strict=True):
            cut = Cut.of(self.form, t.shape, self.hyper)
            if g != step_cuda.SKIP and cut.n:
                kept = {n: view(t.states[n], size, np.float32) for n, size in cut.sizes(self.form).items()}
                p, grad = (view(a, cut.n, np.float32) for a in (t.p, g))
                whole_host.step(self.form, self.hyper, p, grad, kept, t.shape, rows[k])

    def run_live(self, grads: Any, rows: int, which: Any, stream: int) -> None:
        made = []
        for k in range(whole_cuda.ROWS):
            half = rows_cuda.PAIR // 2
            words = view(rows + k * half, half, np.uint8)
            if words[128:136].view(np.uint64)[0] and not k:
                return
            scalars = words[:64].view(np.float32)[: len(self.form.module.SCALARS)].copy()
            made.append(whole_rules.Rows(scalars, words[64:128].view(np.float64)[: len(self.form.module.WIDE)].copy()))
        self.run(grads, made, which, stream)


class Passes:
    """`muon.Passes` over float32 matrices, in float32 words."""

    def __init__(self, kernel: Any, matrices: Any, n: int, scalars: Any, eps: float, sums: int) -> None:
        self.kernel, self.matrices, self.n, self.eps, self.skip = kernel, matrices, n, eps, False
        if isinstance(scalars, int):
            words = view(scalars, rows_cuda.BYTES, np.uint8)
            self.skip, scalars = bool(words[72:].view(np.uint64)[0]), words[:20].view(np.float32).copy()
        self.row = scalars

    def run(self, name: str, stack: int, stream: int) -> None:
        (mu, rest, decay, step, gs), n = self.row, self.n
        for k, m in enumerate(self.matrices if not self.skip else ()):
            g, B, p = (view(at, n, np.float32) for at in m)
            X = view(stack + 4 * n * k, n, np.float32)
            Z = rest * (g * gs) + mu * B if self.kernel.nesterov else B
            if name == "momentum":
                B[:] = mu * B + rest * (g * gs)
            elif name == "input":
                norm = np.sqrt((Z.astype(np.float64) ** 2).sum())
                X[:] = Z * np.float32(self.kernel.unit / max(norm, self.eps))
            else:
                p[:] = p * decay - step * (X * np.float32(1 / self.kernel.unit))


def _filled(form: Any, t: int, hyper: Any, seed: int, place: int) -> None:
    """The rows of one step count."""
    if form.stem in whole_rules.WHOLE:
        for vector in (False, True):
            words = view(place + vector * (rows_cuda.PAIR // 2), rows_cuda.PAIR // 2, np.uint8)
            made = whole_rules.rows(form.stem, t, vector, hyper)
            words[: made.scalars.nbytes].view(np.float32)[:] = made.scalars
            words[64 : 64 + made.wide.nbytes].view(np.float64)[:] = made.wide
        return
    words, gs = view(place, rows_cuda.BYTES, np.uint8), -hyper["gscale"] if hyper["maximize"] else hyper["gscale"]
    if form is rows_cuda.PLAIN:
        made = np.array([gs, hyper["lr"]], np.float32)
    elif form is rows_cuda.MUON:
        mu, lr = hyper["momentum"], hyper["lr"]
        made = np.array([mu, 1 - mu, 1 - lr * hyper["wd"], lr * hyper["factor"], gs], np.float32)
    else:
        made = rules.row(form.stem, t, hyper)
    words[: 4 * made.size].view(np.float32)[:] = made
    words[64:72].view(np.uint64)[0] = step_word(seed, t)


def rows(
    form: Any, hyper: Any, counts: Any, place: int, factor: rows_cuda.Factor, device: int, stream: int, **more: Any
) -> None:
    """What rows.cu does, in its order."""
    rate, wide = more.get("rate", (0, False))
    now = {**hyper, "lr": float(view(rate, 1, np.float64 if wide else np.float32)[0])} if rate else dict(hyper)
    scale = float(view(factor.scale, 1, np.float32)[0]) if factor.scale else 1.0
    skip = bool(factor.inf and view(factor.inf, 1, np.float32)[0] != 0)
    squared = None
    if factor.squares:
        squared = 0.0
        for x in view(factor.squares, factor.measured, np.float64):
            squared += float(x)
    gs = norm.gradient_factor(factor.value / scale, squared, factor.longest)
    for k, (address, step) in enumerate(counts):
        here = place + k * rows_cuda.each(form)
        flags = (here + 128, here + 272) if form.stem in whole_rules.WHOLE else (here + 72,)
        for at in flags:
            view(at, 1, np.uint64)[0] = skip
        if skip:
            continue
        t = int(view(address, 1, np.int64)[0]) + 1 if address else step
        _filled(form, t, {**now, "gscale": gs, "maximize": more["maximize"]}, more["seed"], here)
        if address:
            view(address, 1, np.int64)[0] = t


def sums(kind: Any, addresses: Sequence[int]) -> Callable[[Sequence[int], int], None]:
    """`norm.squares` of float32 gradients."""
    dtype, shapes = kind
    assert dtype == "float32"

    def run(grads: Sequence[int], stream: int) -> None:
        for g, shape, place in zip(grads, shapes, addresses, strict=True):
            n = int(np.prod(shape))
            if n:
                view(place, 1, np.float64)[0] = total(squares(view(g, n, np.float32).reshape(shape)))

    return run


def install(patch: pytest.MonkeyPatch) -> None:
    """Stand in for CUDA in every place that an optimizer asks."""
    Launch.made = []
    patch.setattr(step_cuda, "Launch", Launch)
    patch.setattr(step_cuda, "on_stream", lambda handle: nullcontext())
    patch.setattr(quantize_cuda, "Launch", Carrier)
    patch.setattr(quantize_cuda, "on_stream", lambda handle: nullcontext())
    patch.setattr(whole_cuda, "Whole", Whole)
    patch.setattr(whole_launch, "on_stream", lambda handle: nullcontext())
    patch.setattr(muon, "Passes", Passes)
    patch.setattr(rows_cuda, "run", rows)
    patch.setattr(norm, "squares", sums)
    patch.setattr(torch.cuda, "device", lambda device: nullcontext())
    patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0))


def capture(patch: pytest.MonkeyPatch, on: bool = True) -> None:
    """Say that a CUDA graph captures, or no longer."""
    patch.setattr(checks, "capturing", lambda: on)
    patch.setattr(torch.cuda, "is_initialized", lambda: on)
