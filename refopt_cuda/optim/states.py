"""State tensors of one parameter: made, named, checked before a step and against what a checkpoint brings."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch

from refopt.codecs import CODECS, blocks
from refopt.spec import Rule, ShapeError, State, StateError
from refopt_cuda.codecs import Form, named
from refopt_cuda.optim import sharded
from refopt_cuda.optim.settings import WORDS, Coding, coding, eligible, of_param, roles

ZEROS: Mapping[str, float] = MappingProxyType({})
DTYPES = {
    np.dtype(np.uint8): torch.uint8,
    np.dtype(np.int8): torch.int8,
    np.dtype(np.int16): torch.int16,
    np.dtype(np.uint16): torch.bfloat16,  # words of that format
    np.dtype(np.float16): torch.float16,
    np.dtype(np.float32): torch.float32,
}
"""What torch calls the arrays that codecs store."""
FORMAT = 1
"""How states are laid out in a checkpoint: every parameter group carries this number as `format`, and a load takes all
up to it. A change of keys, shapes, dtypes or meaning of what is kept raises it."""


class Part(NamedTuple):
    """One tensor that is kept for a parameter: its key in `state[p]`, shape, dtype and first value."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    first: float

    @property
    def bytes(self) -> int:
        """What it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


PENDING = "pending"
"""Where the gradient waits that the next step applies, of an optimizer with a delay."""
Make = Callable[[Part, torch.Tensor], torch.Tensor]
"""Memory for a part of a parameter's state."""


@dataclass(frozen=True)
class Layout:
    """How one parameter's states are kept: a coding a state, the format of its weights, and the tensors in order.

    `parts` are those of each state; `beside` is what lies beside the weights, None where nothing does.
    """

    codings: tuple[Coding, ...]
    parts: tuple[tuple[Part, ...], ...]
    weight: Form | None = None
    beside: Part | None = None

    @cached_property
    def all(self) -> tuple[Part, ...]:
        return (*chain.from_iterable(self.parts), *([self.beside] if self.beside else []))

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Every entry in `state[p]` but the step count."""
        return tuple(part.key for part in self.all)


def layout(rule: Rule, hyper: Mapping[str, Any], group: Mapping[str, Any], p: torch.Tensor) -> Layout:
    """The states of `p` that a step keeps under this group's hyper-parameters, codecs, block and min_size."""
    first = roles(rule, hyper)
    return layout_of([s for s in rule.states if s.name in first], group, p, first)


def layout_of(
    kept: Iterable[State], group: Mapping[str, Any], p: torch.Tensor, first: Mapping[str, float] = ZEROS
) -> Layout:
    """These states of `p` under its group's codecs, block and min_size, or its own."""
    group = of_param(group, p)
    coded, shape = eligible(p, group["min_size"]) and sharded.whole_blocks(p, group), tuple(p.shape)
    codings, parts = [], []
    for state in kept:
        found = coding(group["codecs"][state.name] if coded else "f32", group["block"], state.nonnegative)
        codings.append(found)
        parts.append(_parts(state, found, shape, first.get(state.name, 0.0)))
    text = group["codecs"].get("p")
    if text is None or p.dtype != torch.bfloat16:
        return Layout(tuple(codings), tuple(parts))
    weight = named(text)
    return Layout(tuple(codings), tuple(parts), weight, _beside(weight, shape))


def _parts(state: State, found: Coding, shape: tuple[int, ...], first: float) -> tuple[Part, ...]:
    form, block = found
    if not form.scaled:
        return (Part(state.torch or state.name, shape, WORDS[form.stem], first),)
    code, scale = _first(form, block, first)
    codes = Part(
        f"{state.name}.codes", _codes_shape(form, block, shape), DTYPES[form.module.dtype(**form.options)], code
    )
    scales = DTYPES[form.module.scale_dtype(**form.options)]
    return codes, Part(f"{state.name}.scales", blocks.grid(shape, block), scales, scale)


@cache
def _first(form: Form, block: int, first: float) -> tuple[float, float]:
    """The code (two of them, in four bits) and the scale of a block of equal numbers."""
    box = CODECS[form.stem](**form.options, block=block).encode(np.full(2, first, np.float32))
    return float(box.codes.reshape(-1)[0]), float(box.scales.reshape(-1)[0])


def _codes_shape(form: Form, block: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As the tensor; two codes of four bits share a byte, and every block begins one."""
    if form.module.BITS == 8:
        return shape
    rows = blocks.layout_of(shape) == "rows"
    row = shape[-1] if rows else math.prod(shape)
    count = row // block * -(-block // 2) + -(-(row % block) // 2)
    return (*shape[:-1], count) if rows else (count,)


def _beside(weight: Form, shape: tuple[int, ...]) -> Part | None:
    dtype = weight.module.rest_dtype(**weight.options)
    return None if dtype is None else Part(f"p.{CODECS[weight.stem].parts[1].name}", shape, DTYPES[dtype], 0)


def beside(part: Part, p: torch.Tensor) -> torch.Tensor:
    """Memory for a part of a parameter's state, on the parameter's device."""
    try:
        return sharded.empty(part.shape, part.dtype, p)
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{part.key!r} of a parameter of shape {tuple(p.shape)} does not fit on {p.device}; "
            f'place="paged" keeps states in host memory. {error}'
        ) from error


def begun(kept: Layout, have: Mapping[str, Any] | None) -> bool:
    """Whether a parameter's entry has what this layout keeps; if not, the states are yet to be made."""
    return bool(have) and not (kept.keys and have.keys() <= {"step", PENDING})  # type: ignore[union-attr]


def ready(kept: Layout, have: dict[str, Any] | None, p: torch.Tensor, call: str, make: Make = beside) -> dict[str, Any]:
    """The entry to step `p` with: the one that it has, or a new one, in memory from `make`, where no state has begun.

    SGD's momentum may be switched on later: the buffer begins then, and so does the count, as torch.optim has it.
    """
    where = f"{call}: the state of a parameter of shape {tuple(p.shape)}"
    if have is None or not begun(kept, have):
        waits = {PENDING: have[PENDING]} if have and PENDING in have else {}
        return {"step": 0, **{part.key: sharded.filled(make(part, p), part.first) for part in kept.all}, **waits}
    steps, home = count(have, where), p.device if make is beside else torch.device("cpu")
    for part in kept.all:
        x = _fitting(part, have, where)
        if x.dtype != part.dtype or x.device != home or not sharded.fits(x, p):
            raise StateError(
                f"{where}: {part.key!r} is {x.dtype} on {x.device} of strides {x.stride()}; "
                f"it must be {part.dtype} on {home}, row-major and sharded as its parameter is"
            )
    return have if type(have.get("step")) is int else {**have, "step": steps}


def check(known: Layout, needed: Layout, saved: Mapping[str, Any], where: str) -> None:
    """Raise StateError or ShapeError where a saved entry is not of these layouts; floats of another width are fine.

    known    every state that the rule may keep
    needed   those that the next step reads
    """
    count(saved, where)
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


def restore(known: Layout, saved: Mapping[str, Any], p: torch.Tensor, make: Make = beside) -> dict[str, Any]:
    """A copy of a checked entry in the layout's dtypes, in memory from `make`: codes stay codes."""
    have = _present(saved)
    out: dict[str, Any] = {"step": count(saved, "")}
    for part in known.all:
        if part.key in have:
            out[part.key] = sharded.fill(make(part, p), have[part.key])
    if PENDING in have:
        g = have[PENDING]
        out[PENDING] = sharded.fill(make(Part(PENDING, tuple(g.shape), g.dtype, 0), p), g)
    return out


def _present(saved: Mapping[str, Any]) -> dict[str, Any]:
    """torch.optim may keep None for a state that has not begun."""
    return {key: x for key, x in saved.items() if x is not None}


def count(entry: Mapping[str, Any], where: str, usual: int | None = None) -> int:
    """Steps taken; `usual` where none are counted. torch.optim.SGD keeps no count: there a momentum that has begun has
    been stepped."""
    if "step" not in entry and not _present(entry).keys() - {"momentum_buffer"}:
        return len(_present(entry))
    step = entry.get("step", usual)
    try:
        found = int(step)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = -1
    if found < 0 or found != step:
        raise StateError(f"{where}: 'step' must be a whole number >= 0, got {step!r}")
    return found


def _fitting(part: Part, entry: Mapping[str, Any], where: str) -> torch.Tensor:
    x = entry.get(part.key)
    if not isinstance(x, torch.Tensor):
        raise StateError(f"{where} has no tensor {part.key!r}; it has {', '.join(map(str, entry))}")
    if tuple(x.shape) != part.shape:
        raise ShapeError(f"{where}: {part.key!r} has shape {tuple(x.shape)}, it must have {part.shape}")
    return x


def check_format(group: Mapping[str, Any], where: str) -> None:
    """StateError for states in a format that this version does not know; a group without a number is torch.optim's."""
    found = group.get("format", FORMAT)
    if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise StateError(f"{where} is in checkpoint format {found!r}; this version of refopt reads up to {FORMAT}")


def _way(state_dict: Mapping[str, Any]) -> str:
    """Where a refused state is of another library: what takes those over."""
    if any("format" in group for group in state_dict["param_groups"]):
        return ""
    entries = [entry for entry in state_dict["state"].values() if isinstance(entry, Mapping)]
    keys, kinds = {str(k) for entry in entries for k in entry}, {type(x).__name__ for e in entries for x in e.values()}
    library = "torch"
    if keys & {"__bnb_optimizer_quant_state__", "state1"}:
        library = "bitsandbytes"
    elif any(kind.startswith("OptimState") for kind in kinds):
        library = "torchao"
    elif any("::" in key or key == "error_bits" for key in keys):
        library = "flashoptim"
    elif any("relative_step" in group for group in state_dict["param_groups"]):
        library = "transformers"
    return f". It is a state of another library: see refopt_cuda.convert.from_{library}"


def load(
    opt: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    check: Callable[[dict[str, Any]], None],
    restore: Callable[[dict[str, Any]], None],
) -> None:
    """torch's `load_state_dict`: `check` sees what is loaded before anything is changed, `restore` puts states back.

    torch would cast states to the weights' dtype, on the weights' device: it is shown none, and `restore` gets them as
    they were saved. Settings that the saved groups lack stay. Raises ShapeError where the groups hold other numbers of
    tensors.
    """
    mine = [dict(group) for group in opt.param_groups]
    seen: dict[str, Any] = {}

    def look(_: Any, final: dict[str, Any]) -> dict[str, Any]:  # after the user's own hooks
        theirs, ours = ([len(g["params"]) for g in side] for side in (final["param_groups"], opt.param_groups))
        if theirs != ours:
            call = f"{type(opt).__name__}.load_state_dict"
            raise ShapeError(f"{call}: parameter groups have {theirs} tensors, this optimizer has {ours}")
        for k, group in enumerate(final["param_groups"]):
            check_format(group, f"{type(opt).__name__}.load_state_dict: group {k}")
        try:
            check(final)
        except (StateError, ShapeError) as error:
            of_a_state = str(error).startswith(f"{type(opt).__name__}.load_state_dict: state[")
            raise type(error)(f"{error}{_way(final) if of_a_state else ''}") from None
        seen.update(final)
        ids = {k for group in final["param_groups"] for k in group["params"]}
        return {**final, "state": {k: v for k, v in final["state"].items() if k not in ids}}

    def put_back(_: Any) -> None:  # before the user's own hooks
        for group, ours in zip(opt.param_groups, mine, strict=True):
            for name in ours:
                group.setdefault(name, ours[name])
            group["format"] = FORMAT
        restore(seen)

    before = opt.register_load_state_dict_pre_hook(look)
    after = opt.register_load_state_dict_post_hook(put_back, prepend=True)
    try:
        torch.optim.Optimizer.load_state_dict(opt, state_dict)
    finally:
        before.remove()
        after.remove()
