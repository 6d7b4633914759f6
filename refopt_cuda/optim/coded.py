"""States in codes for rules whose steps take float32: decoded before a step, encoded behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from refopt_cuda.kernels import quantize_cuda
from refopt_cuda.kernels.transfer import LOAD, STORE, Transfer
from refopt_cuda.optim import live
from refopt_cuda.optim.settings import Coding
from refopt_cuda.quantization import Quantized, dequantize, quantize

W = TypeVar("W")
MOST_BOUND = 1 << 14
"""Launches that are kept: where memory never comes back to the same places they would only pile up."""


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


class Launched(NamedTuple):
    """What a launch is bound to: addresses of codes and scales, and that of what is decoded (LOAD)."""

    device: torch.device
    transfer: Transfer
    coding: Coding
    codes: int
    scales: int
    shape: tuple[int, ...]
    x: int = 0

    def bind(self) -> quantize_cuda.Bound:
        """The launch, its table on the device."""
        at = self.codes, self.scales
        made = quantize_cuda.Bound(self.transfer, self.coding.form, at, self.shape, self.coding.block, self.x)
        with torch.cuda.device(self.device):
            made.bind(torch.cuda.current_stream(self.device).cuda_stream)
        return made

    def run(self, bound: quantize_cuda.Bound, x: int = 0) -> None:
        """Enqueue on torch's current stream; `x` is the address of what is encoded (STORE)."""
        with torch.cuda.device(self.device):
            bound.run(torch.cuda.current_stream(self.device).cuda_stream, x)


class Direct:
    """Coded states are decoded in memory that is free again after the step, and encoded where they lie. Launches are
    bound once for all places of a state and of what is decoded, which an allocator gives again and again."""

    def __init__(self) -> None:
        self.bound: dict[Launched, quantize_cuda.Bound] = {}

    def decoded(self, coding: Coding, tensors: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """As `decoded`."""
        if not coding.form.scaled or not tensors[0].is_cuda:
            return decoded(coding, tensors, shape)
        x = torch.empty(shape, dtype=torch.float32, device=tensors[0].device)
        self._run(LOAD, coding, tensors, x)
        return x

    def store(
        self, coding: Coding, tensors: Sequence[torch.Tensor], x: torch.Tensor, skip: torch.Tensor | None = None
    ) -> None:
        """As `store`; a step that a device may skip is encoded in new memory."""
        if skip is None and coding.form.scaled and x.is_cuda:
            self._run(STORE, coding, tensors, x.contiguous())
        else:
            store(coding, tensors, x, skip)

    def _run(self, transfer: Transfer, coding: Coding, tensors: Sequence[torch.Tensor], x: torch.Tensor) -> None:
        codes, scales = (t.data_ptr() for t in tensors)
        target = x.data_ptr() if transfer is LOAD else 0
        key = Launched(x.device, transfer, coding, codes, scales, tuple(x.shape), target)
        if key not in self.bound:
            if len(self.bound) >= MOST_BOUND:
                self.bound.clear()
            self.bound[key] = key.bind()
        key.run(self.bound[key], x.data_ptr())


class Within(NamedTuple):
    """A launch in a room, whose memory may move: what lies there, `x` (LOAD) or codes and scales (STORE), is told by
    bytes into its memory or its spare memory."""

    told: Launched

    def at(self, memory: int, spare: int) -> Launched:
        """Where the room's memory lies at these addresses."""
        x = self.told
        if x.transfer is LOAD:
            return x._replace(x=memory + x.x)
        return x._replace(codes=spare + x.codes, scales=spare + x.scales)


class Room:
    """Memory in which coded states are decoded, at the same places in every step, and launches that are bound to them:
    what a CUDA graph can repeat. All that is decoded together is asked for at once, and good until the next `begin`;
    `settle` ends a step.
    """

    def __init__(self) -> None:
        self.memory: dict[torch.device, torch.Tensor] = {}
        self.spare: dict[torch.device, torch.Tensor] = {}
        self.bound: dict[Within, tuple[Launched, quantize_cuda.Bound]] = {}
        self.lost: set[Within] = set()
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
                    self.lost.update(self.bound)
                    self.bound.clear()
        self.at = dict.fromkeys(self.at, 0)

    def settle(self) -> None:
        """Bind what was bound before the room grew: the next step may be captured."""
        for key in self.lost - self.bound.keys():
            self._launch(key)
        self.lost.clear()

    def decoded(self, coding: Coding, tensors: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
        """As `decoded`, in this room."""
        if coding.form.stem == "f32":
            return tensors[0]
        device, count = tensors[0].device, math.prod(shape)
        at, self.at[device] = self.at[device], self.at[device] + _round(count)
        x = self.memory[device][at : at + count].view(shape)
        if coding.form.scaled:
            codes, scales = (t.data_ptr() for t in tensors)
            self._run(Launched(device, LOAD, coding, codes, scales, shape, at * x.itemsize))
        else:
            x.copy_(tensors[0])
        return x

    def store(
        self, coding: Coding, tensors: Sequence[torch.Tensor], x: torch.Tensor, skip: torch.Tensor | None = None
    ) -> None:
        """As `store`: encoded beside the state's tensors, then copied, so that a step may be skipped in any replay."""
        new = [x]
        if coding.form.scaled:
            codes, scales = tensors
            spare, behind = self.spare[x.device], _round(codes.nbytes)
            places = spare[: codes.nbytes], spare[behind : behind + scales.nbytes]
            new = [place.view(old.dtype).view(old.shape) for place, old in zip(places, tensors, strict=True)]
            self._run(Launched(x.device, STORE, coding, 0, behind, tuple(x.shape)), x.data_ptr())
        for old, now in zip(tensors, new, strict=True):
            if old is not now:
                put(old, now, skip)

    def _run(self, told: Launched, x: int = 0) -> None:
        key = Within(told)
        if key not in self.bound:
            live.refuse_in_capture("tables of coded states")
            self._launch(key)
        launched, bound = self.bound[key]
        launched.run(bound, x)

    def _launch(self, key: Within) -> None:
        """Bind a launch to where things lie now."""
        device = key.told.device
        launched = key.at(self.memory[device].data_ptr(), self.spare[device].data_ptr())
        self.bound[key] = launched, launched.bind()


def _round(count: int) -> int:
    """Up to whole vectors of 16 bytes, and more."""
    return -(-count // 64) * 64
