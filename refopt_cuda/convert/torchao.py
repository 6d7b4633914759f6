"""torchao (torchao.optim): Adam and AdamW over tensor subclasses: 8 bits, 4 bits, 8-bit floats; flat blocks."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch

from refopt.spec import StateError
from refopt_cuda.codecs import named
from refopt_cuda.convert import walk
from refopt_cuda.convert.coded import Coded, Kept, Losses, coded_as, reads, values
from refopt_cuda.optim import states
from refopt_cuda.optim.composed import Composed
from refopt_cuda.optim.settings import Coding

RULES = {"adam": "Adam", "adamw": "AdamW"}
KEYS = {"m": "exp_avg", "v": "exp_avg_sq", "w": "max_exp_avg_sq"}
KINDS = {"8bit": ("dynamic8", 256), "4bit": ("q4", 128), "fp8": ("fp8", 256)}
"""What follows a class's name, as its states are here."""
SUBCLASSES = {"OptimState8bit": "8bit", "OptimState4bit": "4bit", "OptimStateFp8": "fp8"}
MODULES = {codec: kind for kind, (codec, _) in KINDS.items()}
LEAST = 4096
"""Elements from which torchao codes a tensor, if they are whole blocks."""


def from_torchao(state_dict: Mapping[str, Any], opt: Composed) -> dict[str, Any]:
    """A state dict of torchao as one that `opt.load_state_dict` takes; `opt` is left as it is.

    state_dict  of torchao.optim.Adam8bit, AdamW4bit, AdamWFp8 ...: OptimState8bit, OptimState4bit and OptimStateFp8 of
                whole tensors (no DTensor), or plain tensors in the weights' dtype
    opt         Adam or AdamW over the same parameters, in the same groups; its codecs are free

    Where `opt` keeps the same codec in the same blocks and the rows of a tensor are whole blocks, codes and scales pass
    as they are: the maps differ from ours by at most one unit in the last place (unsigned 8 bits: two). All else is
    decoded and, where `opt` codes it, encoded anew, with a warning. A zero block keeps torchao's scale of 1e-12.

    Settings come along. Raises StateError or ShapeError for another rule or other shapes.
    """
    call, opt = "from_torchao", walk.check_composed(opt, "from_torchao")
    walk.refuse(opt.rule, RULES, call, "torchao")
    roles = {key: role for role, key in KEYS.items()}

    def group(theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
        kept = {name: theirs[name] for name in ("betas", "eps", "weight_decay", "amsgrad")}
        return kept | {"lr": float(theirs["lr"])}

    def entry(theirs: Mapping[str, Any], place: walk.Place, where: str) -> walk.Entry:
        for key in theirs:
            if key != "step" and key not in roles:
                raise StateError(f"{where} has {key!r}; torchao keeps {', '.join(roles)}")
        kept = {roles[key]: _state(x, f"{where}: {key!r}") for key, x in theirs.items() if key != "step"}
        return walk.Entry(states.count(theirs, where), kept)

    return walk.read(state_dict, opt, call, group, entry)


def _state(x: Any, where: str) -> Kept:
    """A tensor subclass of theirs, or plain numbers."""
    kind = SUBCLASSES.get(type(x).__name__)
    if kind is None:
        if type(x) not in (torch.Tensor, torch.nn.Parameter):
            raise StateError(f"{where} is a {type(x).__name__}: gather whole tensors of torchao's states first")
        return x
    if kind == "fp8":
        table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        return Coded(x.codes.view(torch.uint8), x.scale, x.block_size, tuple(x.shape), named("fp8.e4m3"), table)
    form = named(KINDS[kind][0], not x.signed)
    return Coded(x.codes, x.scale, x.block_size, tuple(x.shape), form if reads(form, x.qmap) else None, x.qmap)


def to_torchao(opt: Composed, kind: str | None = None) -> dict[str, Any]:
    """The state of `opt`, Adam or AdamW, as a state dict of torchao; torchao must be installed.

    kind  of the class that will load it: "8bit", "4bit" or "fp8"; by default what `opt` keeps its states in (dynamic8,
          q4, fp8). Blocks are torchao's defaults, 256, 128 and 256

    Tensors of at least 4096 elements that are whole blocks become OptimState8bit, OptimState4bit or OptimStateFp8: the
    same bytes where `opt` keeps that codec in these blocks and the rows are whole blocks, encoded anew elsewhere (with
    a warning). Others become plain float32 tensors, which torchao casts to the weights' dtype when it loads them. What
    lies beside bfloat16 weights stays behind, with a warning.

    Raises ValueError for a kind that is none, or not known from the codecs, and StateError for another rule or a
    setting that torchao does not have.
    """
    call, opt = "to_torchao", walk.check_composed(opt, "to_torchao")
    walk.refuse(opt.rule, RULES, call, "torchao")
    codec, block = KINDS[_kind(opt, kind, call)]
    nonnegative = {s.name: s.nonnegative for s in opt.rule.states}
    codings = {role: Coding(named(codec, nonnegative[role]), block) for role in KEYS}

    def group(ours: Mapping[str, Any], where: str) -> dict[str, Any]:
        same = ("betas", "eps", "weight_decay", "amsgrad")
        walk.plain(ours, opt.rule, set(same), where, "torchao")
        return {"lr": torch.tensor(float(ours["lr"]), dtype=torch.float32)} | {name: ours[name] for name in same}

    def entry(found: walk.Entry, place: walk.Place, losses: Losses) -> dict[str, Any]:
        shape, out = tuple(place.p.shape), {"step": torch.tensor(float(found.step))}
        for role, x in walk.without_bits(found, losses).items():
            if place.p.numel() >= LEAST and place.p.numel() % block == 0:
                out[KEYS[role]] = _subclass(coded_as(x, codings[role], shape, losses), place.p)
            else:
                out[KEYS[role]] = values(x).reshape(shape)
        return out

    return walk.write(opt, call, group, entry)


def _kind(opt: Composed, kind: str | None, call: str) -> str:
    if kind is not None:
        if kind not in KINDS:
            raise ValueError(f"{call}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
        return kind
    codecs = {group["codecs"][role].partition(":")[0] for group in opt.param_groups for role in ("m", "v")}
    found = [name for name, (codec, _) in KINDS.items() if codecs == {codec}]
    if not found:
        raise ValueError(
            f"{call}: kind must say for which class ({', '.join(KINDS)}): states here are {', '.join(codecs)}"
        )
    return found[0]


def _subclass(x: Coded, p: torch.Tensor) -> torch.Tensor:
    """Codes of ours as their tensor subclass."""
    form, scale = x.form, x.scales.reshape(-1)
    assert form is not None
    theirs = importlib.import_module(f"torchao.optim.subclass_{MODULES[form.stem]}")
    if form.stem == "fp8":
        return theirs.OptimStateFp8(x.codes.reshape(x.shape).view(torch.float8_e4m3fn), scale, p.dtype)
    signed = bool(form.options["signed"])
    map_of = theirs.get_qmap_signed if signed else theirs.get_qmap_unsigned
    qmap = torch.tensor(map_of(), dtype=torch.float32, device=p.device)
    if form.stem == "dynamic8":
        return theirs.OptimState8bit(x.codes.reshape(x.shape), scale, qmap, signed, p.dtype)
    return theirs.OptimState4bit(x.codes.reshape(-1), scale, qmap, signed, torch.Size(x.shape), p.dtype)
