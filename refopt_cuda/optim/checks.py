"""What a step refuses before it writes anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from refopt.spec import ShapeError
from refopt_cuda.optim import sharded

NUMBERS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
"""Dtypes of parameters and gradients, as the kernels call them."""
Pair = tuple[torch.Tensor, torch.Tensor]


def param(p: torch.Tensor, call: str) -> None:
    """TypeError for weights that no kernel steps."""
    if p.dtype not in NUMBERS or p.layout != torch.strided:
        raise TypeError(f"{call}: parameters must be dense float32, bfloat16 or float16, got {p.dtype}, {p.layout}")
    if p.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{call}: parameters must be on a CPU or a CUDA device, got {p.device}")
    sharded.check(p, call)


def format_of_weights(group: Mapping[str, Any], call: str) -> None:
    """ValueError where a format of bfloat16 weights is asked for and no parameter of the group is bfloat16."""
    text, dtypes = group["codecs"].get("p"), {p.dtype for p in group["params"]}
    if text is not None and dtypes and torch.bfloat16 not in dtypes:
        got = ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
        raise ValueError(f"{call}: codecs['p'] = {text!r} is a format of bfloat16 weights; these are {got}")


def gather(params: Iterable[torch.Tensor], call: str) -> list[Pair]:
    """(p, gradient) of every parameter that has one, all checked."""
    pairs = [(p, g) for p in params if (g := p.grad) is not None]
    for p, g in pairs:
        if g.layout is not torch.strided or g.dtype not in NUMBERS:
            raise TypeError(f"{call}: gradients must be dense float32, bfloat16 or float16, got {g.dtype}, {g.layout}")
        if g.shape != p.shape:
            raise ShapeError(f"{call}: a gradient has shape {tuple(g.shape)}, its parameter has {tuple(p.shape)}")
        if g.device != p.device:
            raise ValueError(f"{call}: a gradient is on {g.device}, its parameter is on {p.device}")
        if p.dtype not in NUMBERS:
            param(p, call)
    return pairs


def apart(params: Iterable[torch.Tensor], call: str) -> None:
    """ValueError where parameters share memory: their elements would be stepped at once.

    Parameters with gaps, such as columns of one matrix, may interleave; they are not compared.
    """
    spans = []
    for p in params:
        extent = 1 + sum((n - 1) * s for n, s in zip(p.shape, p.stride(), strict=True))
        if 0 < p.numel() > extent:
            raise ValueError(f"{call}: a parameter of strides {p.stride()} has elements that share memory")
        if 0 < p.numel() == extent:
            end = p.data_ptr() + extent * p.element_size()
            spans.append((str(p.device), p.data_ptr(), end, tuple(p.shape)))
    spans.sort()
    for (where, _, end, one), (there, start, _, two) in zip(spans, spans[1:], strict=False):
        if where == there and start < end:
            raise ValueError(f"{call}: two parameters, of shapes {one} and {two}, share memory; pass one of them")


def capturing() -> bool:
    """Whether a CUDA graph captures what is launched on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def capture(pairs: Iterable[Pair], capturable: bool | None, call: str) -> None:
    """RuntimeError while a CUDA graph is captured, unless devices keep the step counts: replays would repeat one
    learning rate and one count. What the CPU computes would not be repeated at all. None: the class has no such option.
    """
    if not torch.cuda.is_initialized():
        return
    if capturable and capturing() and not all(p.is_cuda for p, _ in pairs):
        raise RuntimeError(f"{call}: a CUDA graph cannot capture the step of parameters on the CPU")
    for device in {p.device for p, _ in pairs if p.is_cuda and not capturable}:
        with torch.cuda.device(device):
            if capturing():
                more = "" if capturable is None else "capturable=True keeps them on the device, or "
                raise RuntimeError(
                    f"{call}: a CUDA graph would repeat one step count and rate; {more}step outside of capture"
                )
