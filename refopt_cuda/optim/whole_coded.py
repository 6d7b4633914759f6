"""LAMB and LARS with states in 8 bits: decoded, stepped in float32 and encoded, each in a pass of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from refopt_cuda.optim import overrides, states
from refopt_cuda.optim.settings import Coding
from refopt_cuda.optim.whole import Slot, Whole, Work
from refopt_cuda.optim.whole_names import LAMB, LARS
from refopt_cuda.quantization import Quantized, dequantize, quantize

__all__ = ["LAMB8bit", "LARS8bit"]

MOST = 1 << 24
"""Elements that are decoded at a time, or one tensor if it has more."""


class CodedSlot(Slot):
    """One parameter with states that may be coded."""

    def __init__(
        self, p: torch.Tensor, mode: Any, names: tuple[str, ...], kept: states.Layout, entry: dict[str, Any]
    ) -> None:
        keys = kept.keys
        super().__init__(p, mode, keys, keys, entry)
        self.states: list[tuple[str, Coding, list[torch.Tensor]]] = [
            (name, coding, [entry[part.key] for part in parts])
            for name, coding, parts in zip(names, kept.codings, kept.parts, strict=True)
        ]


class Opened(Slot):
    """The same parameter with float32 states; `close` encodes them."""

    def __init__(self, coded: CodedSlot) -> None:
        self.p, self.entry, self.row_major, self.states = coded.p, coded.entry, coded.row_major, coded.states
        self.kept = {name: _decoded(coding, tensors, self.p) for name, coding, tensors in self.states}
        self.tensor = self.tensor_of(self.p)

    def close(self) -> None:
        for name, coding, tensors in self.states:
            if coding.form.scaled:
                q = quantize(self.kept[name], _text(coding), block=coding.block)
                for x, new in zip(tensors, (q.codes, q.scales), strict=True):
                    x.copy_(new)


def _text(coding: Coding) -> str:
    """The form's words, as `quantize` takes them."""
    stem, name = coding.form.stem, coding.form.name
    return ".".join([stem, *name.removeprefix(stem).split("_")[1:]])


def _decoded(coding: Coding, tensors: list[torch.Tensor], p: torch.Tensor) -> torch.Tensor:
    if not coding.form.scaled:
        return tensors[0]
    codes, scales = tensors
    out = torch.empty(p.shape, dtype=torch.float32, device=p.device)
    arrays = {"codes": codes, "scales": scales}
    dequantize(Quantized(_text(coding), tuple(p.shape), "float32", coding.block, arrays), out=out)
    return out


class Coded(Whole):
    """Rules of whole tensors whose states are coded."""

    usual, coded = "dynamic8", True

    def layout(self, p: torch.Tensor, hyper: dict[str, Any]) -> tuple[tuple[str, ...], states.Layout]:
        """The names of the states that are kept of a parameter, and where in `state[p]`."""
        names = tuple(self.rule.shapes(tuple(p.shape), hyper))
        codec = overrides.settings_of(p).get("codecs", self.usual)
        group = {"codecs": dict.fromkeys(names, codec), "block": None, "min_size": self.defaults["min_size"]}
        return names, states.layout_of([s for s in self.rule.states if s.name in names], group, p)

    def _slot(
        self, p: torch.Tensor, mode: Any, names: tuple[str, ...], kept: states.Layout, entry: dict[str, Any]
    ) -> Slot:
        return CodedSlot(p, mode, names, kept, entry)

    def _run(self, group: int, hyper: dict[str, Any], work: Iterable[Work]) -> None:
        for some in _batches(work):
            opened = [Opened(w.slot) for w in some]  # type: ignore[arg-type]
            super()._run(group, hyper, [Work(x, w.g, w.t) for x, w in zip(opened, some, strict=True)])
            for x in opened:
                x.close()


def _batches(work: Iterable[Work]) -> Iterator[list[Work]]:
    some: list[Work] = []
    for w in work:
        if some and sum(x.p.numel() for x in some) + w.p.numel() > MOST:
            yield some
            some = []
        some.append(w)
    if some:
        yield some


class LAMB8bit(Coded, LAMB):
    """`LAMB` whose moments are kept in 8 bits (dynamic maps, blocks of 256); smaller tensors keep float32 ones.

    A step decodes at most 16 million elements at a time, or one tensor. bitsandbytes' LAMB8bit takes Adam's steps.
    """


class LARS8bit(Coded, LARS):
    """`LARS` whose velocity is kept in 8 bits (dynamic map, blocks of 256); smaller tensors keep a float32 one.

    A step decodes at most 16 million elements at a time, or one tensor. bitsandbytes' LARS8bit takes SGD's steps.
    """
