"""State tensors of one parameter: made, named, checked before a step and against what a checkpoint brings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import torch

from refopt.codecs import blocks
from refopt.spec import Rule, ShapeError, State, StateError
from refopt_cuda.codecs import BLOCK
from refopt_cuda.optim.settings import WORDS, eligible, roles


class Part(NamedTuple):
    """One tensor that is kept for a parameter: its key in `state[p]`, shape, dtype and first value."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    zero: int


@dataclass(frozen=True)
class Layout:
    """How one parameter's states are kept: a codec stem a state, and the tensors in order."""

    codecs: tuple[str, ...]
    parts: tuple[tuple[Part, ...], ...]

    @cached_property
    def all(self) -> tuple[Part, ...]:
        return tuple(chain.from_iterable(self.parts))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Every state's entries in `state[p]`."""
        return tuple(part.key for part in self.all)


def layout(rule: Rule, hyper: Mapping[str, Any], group: Mapping[str, Any], p: torch.Tensor) -> Layout:
    """The states of `p` that a step keeps under this group's hyper-parameters, codecs, block and min_size."""
    return layout_of(roles(rule, hyper), group, p)


def layout_of(kept: Iterable[State], group: Mapping[str, Any], p: torch.Tensor) -> Layout:
    """These states of `p` under this group's codecs, block and min_size."""
    coded = eligible(p, group["min_size"])
    codecs = [(state, group["codecs"][state.name] if coded else "f32") for state in kept]
    parts = tuple(_parts(state, codec, tuple(p.shape), group["block"]) for state, codec in codecs)
    return Layout(tuple(codec for _, codec in codecs), parts)


def _parts(state: State, codec: str, shape: tuple[int, ...], block: int) -> tuple[Part, ...]:
    if codec not in BLOCK:
        return (Part(state.torch or state.name, shape, WORDS[codec], 0),)
    unsigned = state.nonnegative
    dtype = torch.int8 if codec == "int8_linear" and not unsigned else torch.uint8
    zero = 127 if codec == "dynamic8" and not unsigned else 0
    codes = Part(f"{state.name}.codes", shape, dtype, zero)
    return codes, Part(f"{state.name}.scales", blocks.grid(shape, block), torch.float32, 0)


def ready(kept: Layout, have: dict[str, Any] | None, p: torch.Tensor, call: str) -> dict[str, Any]:
    """The entry to step `p` with: the one that it has, or a new one where no state has begun.

    SGD's momentum may be switched on later: the buffer begins then, and so does the count, as torch.optim has it.
    """
    where = f"{call}: the state of a parameter of shape {tuple(p.shape)}"
    if not have or (kept.keys and have.keys() <= {"step"}):
        zeros = {part.key: torch.full(part.shape, part.zero, dtype=part.dtype, device=p.device) for part in kept.all}
        return {"step": 0, **zeros}
    count = _count(have, where)
    for part in kept.all:
        x = _fitting(part, have, where)
        if x.dtype != part.dtype or x.device != p.device or not x.is_contiguous():
            raise StateError(
                f"{where}: {part.key!r} is {x.dtype} on {x.device} of strides {x.stride()}; "
                f"it must be {part.dtype} on {p.device}, row-major"
            )
    return have if type(have.get("step")) is int else {**have, "step": count}


def check(known: Layout, needed: Layout, saved: Mapping[str, Any], where: str) -> None:
    """Raise StateError or ShapeError where a saved entry is not of these layouts; floats of another width are fine.

    known    every state that the rule may keep
    needed   those that the next step reads
    """
    _count(saved, where)
    begun = [key for key in _present(saved) if key != "step"]
    for key in begun:
        if key not in known.keys:
            raise StateError(f"{where} has {key!r}; this optimizer keeps {', '.join(known.keys)}")
    for part in known.all if begun else ():
        if part.key not in needed.keys and part.key not in begun:
            continue
        x = _fitting(part, saved, where)
        if x.dtype != part.dtype and not (x.is_floating_point() and part.dtype.is_floating_point):
            raise StateError(f"{where}: {part.key!r} is {x.dtype}, it must be {part.dtype}")


def restore(known: Layout, saved: Mapping[str, Any], p: torch.Tensor) -> dict[str, Any]:
    """A copy of a checked entry in the layout's dtypes on the parameter's device: codes stay codes."""
    have = _present(saved)
    out: dict[str, Any] = {"step": _count(saved, "")}
    for part in known.all:
        if part.key in have:
            out[part.key] = torch.empty(part.shape, dtype=part.dtype, device=p.device).copy_(have[part.key])
    return out


def _present(saved: Mapping[str, Any]) -> dict[str, Any]:
    """torch.optim may keep None for a state that has not begun."""
    return {key: x for key, x in saved.items() if x is not None}


def _count(entry: Mapping[str, Any], where: str) -> int:
    """Steps taken. torch.optim.SGD keeps no count: there a momentum that has begun has been stepped."""
    if "step" not in entry and not _present(entry).keys() - {"momentum_buffer"}:
        return len(_present(entry))
    step = entry.get("step")
    try:
        count = int(step)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        count = -1
    if count < 0 or count != step:
        raise StateError(f"{where}: 'step' must be a whole number >= 0, got {step!r}")
    return count


def _fitting(part: Part, entry: Mapping[str, Any], where: str) -> torch.Tensor:
    x = entry.get(part.key)
    if not isinstance(x, torch.Tensor):
        raise StateError(f"{where} has no tensor {part.key!r}; it has {', '.join(map(str, entry))}")
    if tuple(x.shape) != part.shape:
        raise ShapeError(f"{where}: {part.key!r} has shape {tuple(x.shape)}, it must have {part.shape}")
    return x
