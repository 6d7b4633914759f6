"""States in codes for rules whose steps take float32: decoded before a step, encoded behind it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from refopt_cuda.optim.settings import Coding
from refopt_cuda.quantization import Quantized, dequantize, quantize


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


def refuse_capture(codecs: Iterable[str], capturable: bool, call: str) -> None:
    """ValueError where a step that a CUDA graph may capture would decode states."""
    if capturable and any(codec != "f32" for codec in codecs):
        raise ValueError(
            f"{call}: capturable=True: coded states are decoded into memory that is new in every step, which a CUDA "
            "graph cannot repeat; codecs='f32' keeps them as they are"
        )
