"""From parameter groups to kernels: what is stepped together, and with which pointers."""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from refopt.spec import Rule, ShapeError
from refopt_cuda.kernels import step_cuda, step_host
from refopt_cuda.optim import states
from refopt_cuda.rules import RULES

NUMBERS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
Pair = tuple[torch.Tensor, torch.Tensor]


def check_param(p: torch.Tensor, call: str) -> None:
    """TypeError for weights that no kernel steps."""
    if p.dtype not in NUMBERS or p.layout != torch.strided:
        raise TypeError(f"{call}: parameters must be dense float32, bfloat16 or float16, got {p.dtype}, {p.layout}")
    if p.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{call}: parameters must be on a CPU or a CUDA device, got {p.device}")


def gather(params: Iterable[torch.Tensor], call: str) -> list[Pair]:
    """(p, gradient) of every parameter that has one, all checked before any is stepped."""
    pairs = [(p, p.grad) for p in params if p.grad is not None]
    for p, g in pairs:
        if g.layout is not torch.strided or g.dtype not in NUMBERS:
            raise TypeError(f"{call}: gradients must be dense float32, bfloat16 or float16, got {g.dtype}, {g.layout}")
        if g.shape != p.shape:
            raise ShapeError(f"{call}: a gradient has shape {tuple(g.shape)}, its parameter has {tuple(p.shape)}")
        if g.device != p.device:
            raise ValueError(f"{call}: a gradient is on {g.device}, its parameter is on {p.device}")
        if p.dtype not in NUMBERS:
            check_param(p, call)
    return pairs


@dataclass
class Slot:
    """One parameter ready to be stepped: its dense form and its state tensors."""

    p: torch.Tensor
    dense: torch.Tensor
    kept: states.Layout
    tensors: tuple[tuple[torch.Tensor, ...], ...]
    address: int

    @classmethod
    def of(cls, p: torch.Tensor, kept: states.Layout, state: MutableMapping[str, Any]) -> Slot:
        dense = p.detach() if p.is_contiguous() else p.detach().contiguous()
        tensors = tuple(tuple(_dense(state, part.key) for part in parts) for parts in kept.parts)
        return cls(p, dense, kept, tensors, p.data_ptr())

    def stale(self, state: MutableMapping[str, Any]) -> bool:
        """Whether the parameter or one of its states has been moved or replaced."""
        if self.p.data_ptr() != self.address:
            return True
        parts = zip(self.kept.all(), (t for ts in self.tensors for t in ts), strict=True)
        return any(state.get(part.key) is not t for part, t in parts)

    def __enter__(self) -> None:
        """A parameter that is not row-major is stepped through a copy."""
        if self.dense.data_ptr() != self.address:
            self.dense.copy_(self.p)

    def __exit__(self, *_: object) -> None:
        if self.dense.data_ptr() != self.address:
            self.p.copy_(self.dense)


def _dense(state: MutableMapping[str, Any], key: str) -> torch.Tensor:
    if not state[key].is_contiguous():
        state[key] = state[key].contiguous()
    return state[key]


@dataclass
class Bucket:
    """Parameters of one CUDA device and one combination of dtypes and codecs: one launch."""

    slots: list[Slot]
    launch: step_cuda.Launch


@dataclass
class Plan:
    """What one parameter group's step reuses: a slot a parameter, a bucket a combination."""

    slots: dict[int, Slot] = field(default_factory=dict)
    buckets: dict[Any, Bucket] = field(default_factory=dict)

    def step(
        self,
        rule: Rule,
        hyper: dict[str, Any],
        group: dict[str, Any],
        pairs: Sequence[Pair],
        state: MutableMapping[Any, Any],
    ) -> None:
        """Advance every pair's step count, then run the kernels."""
        rows: dict[int, np.ndarray] = {}
        on_device: dict[Any, list[tuple[Slot, torch.Tensor, int]]] = {}
        for p, g in pairs:
            slot = self._slot(rule, hyper, group, p, state)
            t = state[p]["step"] = state[p]["step"] + 1
            if t not in rows:
                rows[t] = RULES[rule.stem].scalars(t, maximize=group["maximize"], **hyper)
            if p.device.type == "cpu":
                with slot:
                    on_host(rule.stem, slot, g, group["block"], rows[t])
            else:
                key = (p.device, p.dtype, g.dtype, slot.kept.codecs)
                on_device.setdefault(key, []).append((slot, g, t))
        for key, work in on_device.items():
            for k in range(0, len(work), step_cuda.SIZES[-1]):
                self._launch(rule.stem, (*key, k), work[k : k + step_cuda.SIZES[-1]], group["block"], rows)

    def _slot(self, rule: Rule, hyper: dict[str, Any], group: dict[str, Any], p: torch.Tensor, state: Any) -> Slot:
        slot = self.slots.get(id(p))
        if slot is not None and slot.p is p and not slot.stale(state[p]):
            return slot
        kept = states.layout(rule, hyper, group, p)
        if len(state[p]) == 0:
            state[p].update(states.make(kept, p))
        self.slots[id(p)] = slot = Slot.of(p, kept, state[p])
        return slot

    def _launch(
        self, rule: str, key: Any, work: list[tuple[Slot, torch.Tensor, int]], block: int, rows: dict[int, np.ndarray]
    ) -> None:
        device, p_dtype, g_dtype, codecs, _ = key
        with torch.cuda.device(device):
            slots = [slot for slot, _, _ in work]
            bucket = self.buckets.get(key)
            if (
                bucket is None
                or len(bucket.slots) != len(slots)
                or any(a is not b for a, b in zip(bucket.slots, slots, strict=True))
            ):
                launch = (
                    bucket.launch
                    if bucket
                    else step_cuda.Launch(rule, codecs, NUMBERS[p_dtype], NUMBERS[g_dtype], block)
                )
                launch.bind([_tensor(slot) for slot in slots])
                bucket = self.buckets[key] = Bucket(slots, launch)
            grads = [g if g.is_contiguous() else g.contiguous() for _, g, _ in work]
            copied = [slot for slot in slots if slot.dense.data_ptr() != slot.address]
            for slot in copied:
                slot.__enter__()
            stream = torch.cuda.current_stream(device).cuda_stream
            for some in _batches(sorted({t for _, _, t in work})):
                at = {t: i for i, t in enumerate(some)}
                pointers = [
                    g.data_ptr() if t in at else step_cuda.SKIP for (_, _, t), g in zip(work, grads, strict=True)
                ]
                which = None if len(some) == 1 else [at.get(t, 0) for _, _, t in work]
                bucket.launch.run(pointers, np.stack([rows[t] for t in some]), which, stream)
            for slot in copied:
                slot.__exit__()


def _batches(steps: list[int]) -> Iterable[list[int]]:
    """Step counts in groups that one launch can hold; nearly always one group of one."""
    for k in range(0, len(steps), step_cuda.ROWS):
        yield steps[k : k + step_cuda.ROWS]


def _tensor(slot: Slot) -> step_cuda.Tensor:
    pairs = tuple((ts[0].data_ptr(), ts[1].data_ptr() if len(ts) > 1 else 0) for ts in slot.tensors)
    return step_cuda.Tensor(slot.dense.data_ptr(), pairs, tuple(slot.p.shape))


def words(x: torch.Tensor) -> np.ndarray:
    """A CPU tensor's memory as NumPy sees it; bfloat16 as uint16 words."""
    x = x.detach()
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


def on_host(rule: str, slot: Slot, g: torch.Tensor, block: int, row: np.ndarray) -> None:
    """Step one parameter with the compiled loops of the CPU."""
    kept = [dict(zip(("codes", "scales"), map(words, ts), strict=False)) for ts in slot.tensors]
    shape = tuple(slot.p.shape)
    step_host.step(rule, slot.kept.codecs, words(slot.dense), words(g.contiguous()), kept, shape, block, row)
