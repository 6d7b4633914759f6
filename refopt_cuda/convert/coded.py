"""One state as another library keeps it, and the way between that and ours.

Others cut the flattened tensor into blocks; ours run along rows. Where the rows are whole blocks, or there is one row,
both are the same bytes, and codes pass unchanged if the code books agree. Two books agree where no value differs by
more than `NEAR` units in the last place: bitsandbytes and torchao compute theirs in float32, ours are exact fractions
rounded once.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from refopt.codecs import blocks
from refopt.spec import StateError
from refopt_cuda.codecs import Form
from refopt_cuda.optim.settings import Coding
from refopt_cuda.optim.states import Part
from refopt_cuda.quantization import Quantized, dequantize, quantize

NEAR = 2
"""Units in the last place by which a value of another library's code book may differ from ours."""
ANEW = "states rounded anew: {}"


class Coded(NamedTuple):
    """Blocks of a flattened tensor.

    codes   uint8 or int8, one byte a code, or two of four bits, the earlier in the high half; any shape
    scales  one a block: float32, float16
    block   elements that share a scale
    shape   of the tensor
    form    ours that reads these codes to the same values (see `NEAR`), None where there is none
    table   float32, what each code stands for beside scale 1; None where `form` alone says it
    """

    codes: torch.Tensor
    scales: torch.Tensor
    block: int
    shape: tuple[int, ...]
    form: Form | None = None
    table: torch.Tensor | None = None


Kept = torch.Tensor | Coded
"""A state of another library: numbers, or blocks of codes."""


class Losses(Counter[str]):
    """How often something was lost, by a sentence in which `{}` is the number."""


def units_apart(one: np.ndarray, other: np.ndarray) -> int:
    """The largest distance of two float32 arrays in units in the last place; of other lengths, a large number."""
    if one.shape != other.shape:
        return 1 << 31
    signed = [np.where(w < 0, -(w & 0x7FFFFFFF), w) for w in (x.view(np.int32).astype(np.int64) for x in (one, other))]
    return int(np.abs(signed[0] - signed[1]).max(initial=0))


def book(form: Form) -> np.ndarray | None:
    """The values of a form that looks codes up, float32 in ascending order; None for another."""
    signed = form.options.get("signed")
    if form.stem == "dynamic8":
        return form.module.codebook(not signed)
    return form.module.codebook(signed) if form.stem == "q4" else None


def reads(form: Form, table: torch.Tensor) -> bool:
    """Whether a form of ours reads codes of this book to the same values, up to `NEAR`."""
    ours = book(form)
    return ours is not None and units_apart(ours, table.detach().float().cpu().numpy()) <= NEAR


def same_blocks(shape: tuple[int, ...], block: int) -> bool:
    """Whether blocks of the flattened tensor are the blocks that ours are cut into."""
    return blocks.layout_of(shape) == "flat" or shape[-1] % block == 0 or math.prod(shape[:-1]) == 1


def values(kept: Kept) -> torch.Tensor:
    """The numbers of a state, float32, flat."""
    if not isinstance(kept, Coded):
        return kept.detach().float().reshape(-1)
    n = math.prod(kept.shape)
    if kept.table is None:
        if kept.form is None:
            raise ValueError("a coded state needs a form or a table")
        return numbers(kept.form, (n,), kept.block, (kept.codes.reshape(-1), kept.scales.reshape(-1)))
    codes = kept.codes.detach().reshape(-1)
    if len(kept.table) == 16:
        codes = torch.stack([codes >> 4, codes & 15], -1).reshape(-1)[:n]
    scales = kept.scales.reshape(-1).repeat_interleave(kept.block)[:n]
    return kept.table.to(codes.device)[codes.long()] * scales


def fit(kept: Kept, coding: Coding, parts: tuple[Part, ...], shape: tuple[int, ...], losses: Losses) -> dict[str, Any]:
    """Another library's state as our tensors by their keys; codes stay where blocks and books agree."""
    if not coding.form.scaled:
        return {parts[0].key: values(kept).reshape(shape).to(parts[0].dtype)}
    if (
        isinstance(kept, Coded)
        and kept.form == coding.form
        and kept.block == coding.block
        and same_blocks(shape, kept.block)
    ):
        made = kept.codes.reshape(parts[0].shape), kept.scales.reshape(parts[1].shape)
        return {part.key: x.detach().clone() for part, x in zip(parts, made, strict=True)}
    losses[_reason(kept, coding, shape)] += 1
    made = encode(values(kept).reshape(shape), coding)
    return {part.key: x.reshape(part.shape) for part, x in zip(parts, made, strict=True)}


def _reason(kept: Kept, coding: Coding, shape: tuple[int, ...]) -> str:
    name = f"{words(coding.form)} in blocks of {coding.block}"
    if not isinstance(kept, Coded):
        return f"{ANEW}, numbers there and {name} here"
    if kept.form != coding.form or kept.block != coding.block:
        return f"{ANEW}, in another code book or block there and {name} here"
    return f"{ANEW}, of rows that are no whole blocks of {kept.block}: blocks run along rows here"


def words(form: Form) -> str:
    """The name by which `quantize` knows a form: "dynamic8.unsigned", "fp8.e5m2"."""
    chosen = form.name[len(form.stem) + 1 :].split("_")
    return ".".join([form.stem, *filter(None, chosen)])


def encode(x: torch.Tensor, coding: Coding) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes, scales) of a float32 tensor, cut as its shape says."""
    made = quantize(x.contiguous(), words(coding.form), block=coding.block)
    return made.codes, made.scales


def numbers(form: Form, shape: tuple[int, ...], block: int, arrays: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The float32 tensor that codes and scales of ours stand for."""
    kept = dict(zip(("codes", "scales"), (a.detach().contiguous() for a in arrays), strict=True))
    return dequantize(Quantized(words(form), shape, "float32", block, kept))


def ours(entry: Mapping[str, Any], coding: Coding, parts: tuple[Part, ...], shape: tuple[int, ...]) -> Kept:
    """A state of ours: codes where flat blocks are the same blocks, else the numbers that they stand for."""
    found = tuple(entry[part.key].detach().clone() for part in parts)
    if not coding.form.scaled:
        return found[0]
    if same_blocks(shape, coding.block):
        codes, scales = found
        return Coded(codes, scales, coding.block, shape, coding.form)
    return numbers(coding.form, shape, coding.block, found)


def coded_as(kept: Kept, coding: Coding, shape: tuple[int, ...], losses: Losses) -> Coded:
    """A state in flat blocks of this coding: as it is where it is so already, else rounded anew."""
    if isinstance(kept, Coded) and kept.form == coding.form and kept.block == coding.block:
        return kept
    losses[f"{ANEW}, {words(coding.form)} in flat blocks of {coding.block} there and kept otherwise here"] += 1
    codes, scales = encode(values(kept), coding)
    return Coded(codes, scales, coding.block, shape, coding.form)


def shape_of(kept: Kept) -> tuple[int, ...]:
    return kept.shape if isinstance(kept, Coded) else tuple(kept.shape)


def need(condition: bool, message: str) -> None:
    """StateError unless the condition holds."""
    if not condition:
        raise StateError(message)
