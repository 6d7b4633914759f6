"""State tensors of one parameter: made, named, checked against what a checkpoint brings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from refopt.codecs import blocks
from refopt.spec import Rule, StateError
from refopt_cuda.codecs import BLOCK
from refopt_cuda.optim.settings import WORDS, eligible


class Part(NamedTuple):
    """One tensor that is kept for a parameter: its key in `state[p]`, shape, dtype and first value."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    zero: int


class Layout(NamedTuple):
    """How one parameter's states are kept: a codec stem a state, and the tensors in order."""

    codecs: tuple[str, ...]
    parts: tuple[tuple[Part, ...], ...]

    def all(self) -> Iterator[Part]:
        for parts in self.parts:
            yield from parts


def layout(rule: Rule, hyper: Mapping[str, Any], group: Mapping[str, Any], p: torch.Tensor) -> Layout:
    """The states of `p` under this group's codecs, block and min_size."""
    coded = eligible(p, group["min_size"])
    states = rule.states_for(**hyper)
    codecs = tuple(group["codecs"][s.name] if coded else "f32" for s in states)
    shape = tuple(p.shape)
    return Layout(codecs, tuple(_parts(s, c, shape, group["block"]) for s, c in zip(states, codecs, strict=True)))


def _parts(state: Any, codec: str, shape: tuple[int, ...], block: int) -> tuple[Part, ...]:
    if codec not in BLOCK:
        return (Part(state.torch or state.name, shape, WORDS[codec], 0),)
    unsigned = state.nonnegative
    dtype = torch.int8 if codec == "int8_linear" and not unsigned else torch.uint8
    zero = 127 if codec == "dynamic8" and not unsigned else 0
    codes = Part(f"{state.name}.codes", shape, dtype, zero)
    return codes, Part(f"{state.name}.scales", blocks.grid(shape, block), torch.float32, 0)


def make(kept: Layout, p: torch.Tensor) -> dict[str, Any]:
    """Zero states on the parameter's device."""
    out: dict[str, Any] = {"step": 0}
    for part in kept.all():
        out[part.key] = torch.full(part.shape, part.zero, dtype=part.dtype, device=p.device)
    return out


def check(kept: Layout, saved: Mapping[str, Any], where: str) -> None:
    """Raise StateError where a saved state is not what this layout keeps; floats of another precision are fine."""
    if "step" not in saved:
        raise StateError(f"load_state_dict: {where} has no 'step'")
    for part in kept.all():
        have = saved.get(part.key)
        if not isinstance(have, torch.Tensor):
            raise StateError(f"load_state_dict: {where} has no {part.key!r}; it has {', '.join(map(str, saved))}")
        if math.prod(have.shape) != math.prod(part.shape) or tuple(have.shape) != part.shape:
            raise StateError(
                f"load_state_dict: {where}[{part.key!r}] has shape {tuple(have.shape)}, {part.shape} is needed"
            )
        if have.dtype != part.dtype and not (have.is_floating_point() and part.dtype.is_floating_point):
            raise StateError(f"load_state_dict: {where}[{part.key!r}] is {have.dtype}, {part.dtype} is needed")


def restore(kept: Layout, saved: Mapping[str, Any], p: torch.Tensor) -> dict[str, Any]:
    """A copy of saved states in their own dtypes on the parameter's device: codes stay codes."""
    out: dict[str, Any] = {"step": int(saved["step"])}
    for part in kept.all():
        out[part.key] = saved[part.key].detach().to(device=p.device, dtype=part.dtype, copy=True)
    return out
