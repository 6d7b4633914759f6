"""States in codes for rules whose steps take float32: decoded before a step, encoded behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from refopt_cuda.kernels import quantize_cuda
from refopt_cuda.kernels.transfer import LOAD, STORE, Transfer
from refopt_cuda.optim import live
from refopt_cuda.optim.settings import Coding
from refopt_cuda.quantization import Quantized, dequantize, quantize

W = TypeVar("W")


def text(coding: Coding) -> str:
    """The form's words, as `quantize` takes them."""
    stem, name = coding.form.stem, coding.form.name
    return ".".join([stem, *name.removeprefix(stem).split("_")[1:]])


def decoded(coding: Coding, tensors: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """The float32 tensor that a state's tensors stand for; a float32 state is itself."""
    if not coding.form.scaled:
        return tensors[0].float()
    codes, scales = tensors
    out = torch.empty(shape, dtype=torch.float32, device=codes.device)
    arrays = {"codes": codes, "scales": scales}
    return dequantize(Quantized(text(coding), shape, "float32", coding.block, arrays), out=out)


def store(coding: Coding, tensors: Sequence[torch.Tensor], x: torch.Tensor, skip: torch.Tensor | None = None) -> None:
    """Keep a state in its tensors, but where a device says that the step is skipped; a float32 state is itself."""
    new: tuple[torch.Tensor, ...] = (x,)
    if coding.form.scaled:
        q = quantize(x, text(coding), block=coding.block)
        new = q.codes, q.scales
    for old, now in zip(tensors, new, strict=True):
        if old is not now:
            put(old, now, skip)


def put(x: torch.Tensor, new: torch.Tensor, skip: torch.Tensor | None) -> None:
    """x <- new, unless a device says that the step is skipped."""
    x.copy_(new if skip is None else torch.where(skip, x, new.to(x.dtype)))


def together(work: Iterable[W], full: Callable[[list[W]], bool]) -> Iterator[list[W]]:
    """What is held at a time: as many as are not `full`, or one, in their order."""
    some: list[W] = []
    for w in work:
        if some and full([*some, w]):
            yield some
            some = []
        some.append(w)
    if some:
        yield some


class Room:
    """Memory in which coded states are decoded, at the same places in every step, and launches that are bound to them:
    what a CUDA graph can repeat. All that is decoded together is asked for at once, and good until the next `begin`.
    """

    def __init__(self) -> None:
        self.memory: dict[torch.device, torch.Tensor] = {}
        self.spare: dict[torch.device, torch.Tensor] = {}
        self.bound: dict[Any, quantize_cuda.Bound] = {}
        self.at: dict[torch.device, int] = {}

    @property
    def held(self) -> tuple[Any, ...]:
        """What launches were given the addresses of."""
        return list(self.memory.values()), list(self.spare.values()), list(self.bound.values())

    def begin(self, states: Iterable[tuple[Coding, Sequence[torch.Tensor], Sequence[int]]]) -> None:
        """Make room for these states, each with its coding, tensors and shape; those in float32 need none."""
        self.at.clear()
        spare: dict[torch.device, int] = {}
        for coding, tensors, shape in states:
            if coding.form.stem != "f32":
                device = tensors[0].device
                self.at[device] = self.at.get(device, 0) + _round(math.prod(shape))
                spare[device] = max(spare.get(device, 0), sum(_round(x.nbytes) for x in tensors))
        for held, needed, dtype in ((self.memory, self.at, torch.float32), (self.spare, spare, torch.uint8)):
            for device, count in needed.items():
                if device not in held or held[device].numel() < count:
                    live.refuse_in_capture("room for decoded states")
                    held[device] = torch.empty(count, dtype=dtype, device=device)
                    self.bound.clear()
        self.at = dict.fromkeys(self.at, 0)

    def decoded(self, coding: Coding, tensors: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """As `decoded`, in this room."""
        if coding.form.stem == "f32":
            return tensors[0]
        device, count = tensors[0].device, math.prod(shape)
        at, self.at[device] = self.at[device], self.at[device] + _round(count)
        x = self.memory[device][at : at + count].view(shape)
        if coding.form.scaled:
            self._run(LOAD, coding, tensors, shape, x)
        else:
            x.copy_(tensors[0])
        return x

    def store(
        self, coding: Coding, tensors: Sequence[torch.Tensor], x: torch.Tensor, skip: torch.Tensor | None = None
    ) -> None:
        """As `store`: encoded beside the state's tensors, then copied, so that a step may be skipped in any replay."""
        new, at = [x], 0
        if coding.form.scaled:
            new, spare = [], self.spare[tensors[0].device]
            for old in tensors:
                new.append(spare[at : at + old.nbytes].view(old.dtype).view(old.shape))
                at += _round(old.nbytes)
            self._run(STORE, coding, new, tuple(x.shape), x)
        for old, now in zip(tensors, new, strict=True):
            if old is not now:
                put(old, now, skip)

    def _run(
        self,
        transfer: Transfer,
        coding: Coding,
        tensors: Sequence[torch.Tensor],
        shape: tuple[int, ...],
        x: torch.Tensor,
    ) -> None:
        device, (codes, scales) = x.device, (t.data_ptr() for t in tensors)
        target = x.data_ptr() if transfer is LOAD else 0
        key = device, transfer, coding, codes, scales, shape, target
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream(device).cuda_stream
            if key not in self.bound:
                live.refuse_in_capture("tables of coded states")
                made = quantize_cuda.Bound(transfer, coding.form, (codes, scales), shape, coding.block, target)
                made.bind(stream)
                self.bound[key] = made
            self.bound[key].run(stream, 0 if transfer is LOAD else x.data_ptr())


def _round(count: int) -> int:
    """Up to whole vectors of 16 bytes, and more."""
    return -(-count // 64) * 64
