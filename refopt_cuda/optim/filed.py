"""What lies where in a page of `place="disk"`, in words that a table beside the pages keeps; bytes of tensors."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refopt_cuda.optim import sharded, states
from refopt_cuda.optim.pieces import Page, Piece
from refopt_cuda.optim.run import Slot
from refopt_cuda.places.records import Constant, Dense
from refopt_cuda.places.slabs import up

WEIGHTS = "p"
"""What tables call the weights themselves."""
APART = 64
"""Weights of pieces begin at multiples of so many bytes."""


def in_files(kept: states.Layout, p: torch.Tensor) -> bool:
    """Whether there is anything of a parameter to keep in a file, of a sharded one on this rank."""
    return bool(kept.all) and sharded.local(p).numel() > 0


def layout(kept: states.Layout, p: torch.Tensor) -> Any:
    """All that the bytes of a parameter's states mean something by, in words that JSON keeps."""
    codings = [[c.form.stem, sorted(map(str, c.form.options.items())), c.block] for c in kept.codings]
    parts = [[part.key, list(part.shape), str(part.dtype)] for part in kept.all]
    weight = kept.weight.stem if kept.weight else None
    out = {"shape": list(p.shape), "dtype": str(p.dtype), "codings": codings, "weight": weight, "parts": parts}
    return out | ({"shard": [*map(list, sharded.placed(p))]} if sharded.is_sharded(p) else {})


def constant(part: states.Part) -> Constant:
    """The first value of every element."""
    return Constant(bytes(bytes_of(torch.full((1,), part.first, dtype=part.dtype))))


def here(part: states.Part, p: torch.Tensor) -> states.Part:
    """What this rank keeps of a part of a state of `p`."""
    return part._replace(shape=sharded.part_shape(part.shape, p))


def meta(part: states.Part, p: torch.Tensor) -> torch.Tensor:
    """A tensor without memory that stands for it, sharded as `p` is."""
    return sharded.as_part(torch.empty(here(part, p).shape, dtype=part.dtype, device="meta"), part.shape, p)


def dense(have: Mapping[str, Any], part: states.Part, p: torch.Tensor) -> Dense:
    """Bytes of what somebody gave for a part of a state of `p`, brought to the placements of `p`."""
    x = have[part.key].detach()
    if sharded.is_sharded(p) and not sharded.fits(x, p):
        mine = torch.empty(here(part, p).shape, dtype=part.dtype)
        x = sharded.fill(sharded.as_part(mine, part.shape, p), x)
    return Dense(bytes_of(sharded.local(x).to("cpu", part.dtype)))


def bytes_of(x: torch.Tensor) -> np.ndarray:
    """A tensor's memory, of a sharded one this rank's; its own if it is row-major."""
    return sharded.local(x).contiguous().view(-1).view(torch.uint8).numpy()


def mapped(folder: Path, size: int) -> mmap.mmap:
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
        file.truncate(max(size, 1))
        return mmap.mmap(file.fileno(), max(size, 1))


def cuts(page: Page) -> Iterator[tuple[Slot, str, int, int, int]]:
    """What lies in a page: (slot, key, first byte of the stored array, bytes, offset)."""
    for piece in page.pieces:
        for key, span in zip(piece.slot.kept.keys, piece.spans, strict=True):
            yield piece.slot, key, span.start * span.tensor.element_size(), span.bytes, span.offset


def spans(page: Page) -> Iterator[tuple[int, str, int, int, int]]:
    """The same with the parameter's number, for a table."""
    return ((slot.number, key, start, n, at) for slot, key, start, n, at in cuts(page))


def beside(page: Page) -> Iterator[tuple[Piece, int]]:
    """The pieces, and where the weights of each lie in what is kept beside the page."""
    at = 0
    for piece in page.pieces:
        yield piece, at
        at += up(piece.dense.nbytes, APART)


def weight_bytes(page: Page) -> int:
    """What the weights of a page take."""
    return sum(up(piece.dense.nbytes, APART) for piece in page.pieces)


def weights(page: Page) -> Iterator[tuple[int, str, int, int, int]]:
    """As `_spans`, of the weights."""
    for x, at in beside(page):
        yield x.slot.number, WEIGHTS, x.first * x.dense.element_size(), x.dense.nbytes, at


def what(page: Page, of: str) -> str:
    numbers = [piece.slot.number for piece in page.pieces]
    first, last = min(numbers), max(numbers)
    return f"page {page.number} of the {of} of parameter{f' {first}' if first == last else f's {first} to {last}'}"


def about(slots: Iterable[Slot]) -> Iterator[tuple[str, Any]]:
    return ((str(slot.number), layout(slot.kept, slot.p)) for slot in slots)
