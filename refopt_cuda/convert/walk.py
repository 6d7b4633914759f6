"""Parameter by parameter over an optimizer of ours and a state dict of another library's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from refopt.spec import Rule, ShapeError, StateError
from refopt_cuda.convert.coded import Kept, Losses, fit, ours, shape_of
from refopt_cuda.optim import settings, states
from refopt_cuda.optim.composed import Composed

StateDict = dict[str, Any]


class Entry(NamedTuple):
    """A parameter's step count, and its states by role ("m", "v" ...; "p" is what lies beside the weights)."""

    step: int
    kept: Mapping[str, Kept]


class Place(NamedTuple):
    """One parameter of ours: its number, the group, and its states' roles in the order of the layout."""

    number: int
    group: Mapping[str, Any]
    p: torch.Tensor
    roles: tuple[str, ...]
    layout: states.Layout

    @property
    def codings(self) -> dict[str, settings.Coding]:
        """How each role is kept here."""
        return dict(zip(self.roles, self.layout.codings, strict=True))

    def entry(self, state: Mapping[str, Any]) -> Entry:
        """Its states as another library's functions take them."""
        shape, rows = tuple(self.p.shape), zip(self.roles, self.layout.codings, self.layout.parts, strict=True)
        kept: dict[str, Kept] = {role: ours(state, coding, parts, shape) for role, coding, parts in rows}
        if self.layout.beside:
            kept["p"] = state[self.layout.beside.key].detach().clone()
        return Entry(state["step"], kept)


def check_composed(opt: Any, call: str) -> Composed:
    """TypeError for an optimizer whose states are no elements of a rule."""
    if not isinstance(opt, Composed):
        raise TypeError(f"{call}: opt must be an element-wise optimizer of refopt_cuda.optim, got {type(opt).__name__}")
    return opt


def refuse(rule: Rule, known: Mapping[str, Any], where: str, library: str) -> Any:
    """What a table has for a rule; StateError with the rules that the library shares with us."""
    if rule.stem not in known:
        raise StateError(f"{where}: {library} has no {rule.stem}; it has {', '.join(known)}")
    return known[rule.stem]


def plain(group: Mapping[str, Any], rule: Rule, taken: set[str], where: str, library: str) -> None:
    """StateError for settings that the other library does not have, unless they are at their defaults."""
    usual = settings.torch_words(rule) | {"maximize": False}
    if rule.stem == "sgd":
        usual |= {"momentum": group["momentum"]}
    for name, value in usual.items():
        if name not in taken and name != "lr" and group[name] != value:
            raise StateError(f"{where}: {library}'s {rule.stem} has no {name}, here it is {group[name]!r}")


def places(opt: Composed, groups: Sequence[Mapping[str, Any]] | None = None) -> Iterator[Place]:
    """Every parameter, numbered as torch does; `groups` have the settings that decide which states are kept."""
    index = 0
    for own, group in zip(opt.param_groups, groups or opt.param_groups, strict=True):
        hyper = settings.hyper_of(opt.rule, group, type(opt).__name__)
        first = settings.roles(opt.rule, hyper)
        roles = tuple(s.name for s in opt.rule.states if s.name in first)
        for p in own["params"]:
            yield Place(index, group, p, roles, states.layout(opt.rule, hyper, own, p))
            index += 1


def read(
    saved: Mapping[str, Any],
    opt: Composed,
    call: str,
    group_of: Callable[[Mapping[str, Any], str], dict[str, Any]],
    entry_of: Callable[[Mapping[str, Any], Place, str], Entry],
) -> StateDict:
    """Another library's state dict as one that `opt.load_state_dict` takes.

    group_of  (their group, where) -> the settings that it decides, under our names
    entry_of  (their entry, place, where) -> its states by role
    """
    theirs = saved["param_groups"]
    counts = [[len(g["params"]) for g in side] for side in (theirs, opt.param_groups)]
    if counts[0] != counts[1]:
        raise ShapeError(f"{call}: its parameter groups have {counts[0]} tensors, this optimizer's have {counts[1]}")
    groups = [
        {k: v for k, v in own.items() if k != "params"}
        | {k: group[k] for k in ("initial_lr", "param_names") if k in group}
        | group_of(group, f"{call}: group {k}")
        for k, (group, own) in enumerate(zip(theirs, opt.param_groups, strict=True))
    ]
    numbers = [index for group in theirs for index in group["params"]]
    state, losses = {}, Losses()
    for number, place in zip(numbers, places(opt, groups), strict=True):
        entry = {k: x for k, x in saved["state"].get(number, {}).items() if x is not None}
        if entry:
            where = f"{call}: state[{number}]"
            state[number] = _entry(entry_of(entry, place, where), place, where, losses)
    warn(losses, call)
    return {"state": state, "param_groups": [g | {"params": t["params"]} for g, t in zip(groups, theirs, strict=True)]}


def _entry(found: Entry, place: Place, where: str, losses: Losses) -> dict[str, Any]:
    """One parameter's states as ours."""
    shape = tuple(place.p.shape)
    odd = set(found.kept) - set(place.roles) - ({"p"} if place.layout.beside else set())
    if odd:
        words = {"p": "bits beside the weights (codecs={'p': 'bf16_ecc'} keeps them)"}
        raise StateError(f"{where} has {', '.join(words.get(r, r) for r in sorted(odd))}; this optimizer does not")
    out: dict[str, Any] = {"step": found.step}
    for role, coding, parts in zip(place.roles, place.layout.codings, place.layout.parts, strict=True):
        if role not in found.kept:
            raise StateError(f"{where} lacks {role} ({parts[0].key}), which this optimizer keeps")
        if shape_of(found.kept[role]) != shape:
            raise ShapeError(f"{where}: {role} is of shape {shape_of(found.kept[role])}, the parameter of {shape}")
        out |= fit(found.kept[role], coding, parts, shape, losses)
    if beside := place.layout.beside:
        x = found.kept.get("p")
        if x is None:
            x = torch.full(beside.shape, beside.first, dtype=beside.dtype, device=place.p.device)
        elif not isinstance(x, torch.Tensor) or x.dtype != beside.dtype:
            raise StateError(f"{where}: bits beside the weights are {getattr(x, 'dtype', x)}, here {beside.dtype}")
        out[beside.key] = x
    return out


def write(
    opt: Composed,
    call: str,
    group_of: Callable[[Mapping[str, Any], str], dict[str, Any]],
    entry_of: Callable[[Entry, Place, Losses], dict[str, Any]],
) -> StateDict:
    """Our states as another library's state dict.

    group_of  (our group, where) -> theirs without `params`
    entry_of  (states by role, place, losses) -> their entry
    """
    groups, state, losses, start = [], {}, Losses(), 0
    for k, group in enumerate(opt.param_groups):
        numbers = list(range(start, start + len(group["params"])))
        more = {k: group[k] for k in ("initial_lr", "param_names") if k in group}
        groups.append(group_of(group, f"{call}: group {k}") | more | {"params": numbers})
        start += len(numbers)
    saved = opt.state_dict()["state"]
    for place in places(opt):
        if place.number in saved:
            state[place.number] = entry_of(place.entry(saved[place.number]), place, losses)
    warn(losses, call)
    return {"state": state, "param_groups": groups}


def without_bits(entry: Entry, losses: Losses) -> dict[str, Kept]:
    """The states without what lies beside the weights, which most libraries have no place for."""
    if "p" in entry.kept:
        losses["left behind: what lies beside bfloat16 weights, of {} tensors"] += 1
    return {role: x for role, x in entry.kept.items() if role != "p"}


def warn(losses: Losses, call: str) -> None:
    """One warning for each reason why states did not pass bit for bit."""
    for sentence, number in losses.items():
        warnings.warn(f"{call}: {sentence.format(number)}", stacklevel=4)
