"""Adafactor of torch.optim and of transformers, and torch.optim's Muon: states that are factors, or of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from refopt.spec import ShapeError, StateError
from refopt_cuda.optim import states
from refopt_cuda.optim.muon import Muon
from refopt_cuda.optim.whole_names import Adafactor

Tree = dict[str, Any]
KEPT = ("initial_lr", "param_names")
"""What torch itself and its schedulers put into groups."""


class Peer(NamedTuple):
    """A class of another library: whose it is, our class, what ours calls its states and settings, and settings that it
    must have; `apart`: row and column factors have an axis of length 1 there."""

    library: str
    ours: type[torch.optim.Optimizer]
    keys: Mapping[str, str]
    settings: Mapping[str, str]
    needs: Mapping[str, Any]
    apart: bool = False


ADAFACTOR = Peer(
    "torch.optim",
    Adafactor,
    {"row_var": "row_var", "col_var": "col_var", "variance": "variance"},
    {
        "lr": "lr",
        "eps": "eps",
        "d": "clip_threshold",
        "beta2_decay": "decay_rate",
        "weight_decay": "weight_decay",
        "maximize": "maximize",
    },
    {"variant": "torch", "beta1": None},
    True,
)
WORDS = ("lr", "eps", "clip_threshold", "decay_rate", "beta1", "weight_decay")
TRANSFORMERS = Peer(
    "transformers",
    Adafactor,
    {"exp_avg_sq_row": "row_var", "exp_avg_sq_col": "col_var", "exp_avg_sq": "variance", "exp_avg": "m"},
    {name: name for name in (*WORDS, "scale_parameter", "relative_step", "warmup_init")},
    {"variant": "transformers", "maximize": False},
)
MATRIX = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
MUON = Peer(
    "torch.optim",
    Muon,
    {"momentum_buffer": "momentum_buffer"},
    {name: name for name in MATRIX},
    {"maximize": False},
)


def of_torch(opt: Any) -> Peer | None:
    """The class of torch.optim that an optimizer of ours stands for; None for one of elements."""
    return ADAFACTOR if isinstance(opt, Adafactor) else MUON if isinstance(opt, Muon) else None


def from_transformers(state_dict: Mapping[str, Any], opt: Adafactor) -> Tree:
    """A state dict of transformers.Adafactor as one that `opt.load_state_dict` takes; `opt`, an `Adafactor` over the
    same parameters, is left as it is. Its RMS of weights is found anew in each step, and left out.

    Settings come along; states pass bit for bit. Raises TypeError for another optimizer, StateError or ShapeError for
    the state of another rule or of other shapes.
    """
    return read(state_dict, opt, TRANSFORMERS, "from_transformers")


def to_transformers(opt: Adafactor) -> Tree:
    """The state of an `Adafactor` as a state dict of transformers.Adafactor.

    Raises TypeError for another optimizer, StateError for coded states or a setting that transformers does not have.
    """
    return write(opt, TRANSFORMERS, "to_transformers")


def read(saved: Mapping[str, Any], opt: Any, peer: Peer, call: str) -> Tree:
    """The state dict of a peer as one that `opt.load_state_dict` takes."""
    _check(opt, peer, call)
    theirs = saved["param_groups"]
    counts = [[len(g["params"]) for g in side] for side in (theirs, opt.param_groups)]
    if counts[0] != counts[1]:
        raise ShapeError(f"{call}: its parameter groups have {counts[0]} tensors, this optimizer's have {counts[1]}")
    groups, state = [], {}
    for group, own in zip(theirs, opt.param_groups, strict=True):
        made = {k: v for k, v in own.items() if k != "params"} | {k: group[k] for k in KEPT if k in group}
        groups.append(made | {ours: group[name] for name, ours in peer.settings.items() if name in group})
        groups[-1]["params"] = group["params"]
        for number, p in zip(group["params"], own["params"], strict=True):
            entry = {k: x for k, x in saved["state"].get(number, {}).items() if x is not None and k != "RMS"}
            if entry:
                state[number] = _entry(entry, p, peer, f"{call}: state[{number}]")
    return {"state": state, "param_groups": groups}


def _entry(entry: Mapping[str, Any], p: torch.Tensor, peer: Peer, where: str) -> Tree:
    """One parameter's states as ours."""
    odd = sorted(set(entry) - {"step", *peer.keys})
    if odd:
        raise StateError(f"{where} has {odd[0]!r}, which {peer.ours.__name__} does not keep")
    out: Tree = {"step": states.count(entry, where, 1)}
    for name, x in entry.items():
        if name != "step":
            key, axis = peer.keys[name], {"row_var": -1, "col_var": -2}.get(peer.keys[name])
            if peer.apart and axis is not None:
                if x.ndim != p.ndim or x.shape[axis] != 1:
                    raise ShapeError(f"{where}: {name!r} has shape {tuple(x.shape)}, the parameter {tuple(p.shape)}")
                x = x.squeeze(axis)
            out[key] = x.detach().clone()
    return out


def write(opt: Any, peer: Peer, call: str) -> Tree:
    """Our states as a peer's state dict."""
    _check(opt, peer, call)
    names, state, groups, number = {ours: name for name, ours in peer.keys.items()}, {}, [], 0
    for k, group in enumerate(opt.param_groups):
        for name in ("max_grad_norm", "gnorm_scale", "momentum_dtype"):
            usual = {"gnorm_scale": 1.0, "momentum_dtype": "float32"}.get(name)
            if group.get(name, usual) != usual:
                raise StateError(f"{call}: group {k}: {peer.library} has no {name}, here it is {group[name]!r}")
        made = {name: group[ours] for name, ours in peer.settings.items()}
        if peer.apart or peer is TRANSFORMERS:
            made["eps"] = (group["eps"][0] if group["eps"][0] is not None or peer.apart else 1e-30, group["eps"][1])
        made |= {k: group[k] for k in KEPT if k in group}
        groups.append(made | {"params": [*range(number, number + len(group["params"]))]})
        for p in group["params"]:
            if p in opt.state:
                state[number] = _theirs(opt.state[p], p, peer, names)
            number += 1
    return {"state": state, "param_groups": groups}


def _theirs(entry: Mapping[str, Any], p: torch.Tensor, peer: Peer, names: Mapping[str, str]) -> Tree:
    out: Tree = {}
    if peer.ours is not Muon:
        out["step"] = torch.tensor(float(entry["step"])) if peer.apart else int(entry["step"])
    for key, x in entry.items():
        if key != "step":
            axis = {"row_var": -1, "col_var": -2}.get(key) if peer.apart else None
            out[names[key]] = (x if axis is None else x.unsqueeze(axis)).detach().clone()
    if peer is TRANSFORMERS:
        out["RMS"] = (p.detach().float().norm(2) / max(p.numel(), 1) ** 0.5).item()
    return out


def _check(opt: Any, peer: Peer, call: str) -> None:
    """TypeError for another class, StateError for settings that the peer does not have, or codes."""
    if not isinstance(opt, peer.ours):
        raise TypeError(f"{call}: opt must be {peer.ours.__name__} of refopt_cuda.optim, got {type(opt).__name__}")
    for k, group in enumerate(opt.param_groups):
        for name, value in peer.needs.items():
            if group[name] != value:
                found = f"here it is {group[name]!r}"
                raise StateError(f"{call}: group {k}: {peer.library} has {name}={value!r} alone, {found}")
        if any(text != "f32" for text in group["codecs"].values()):
            raise StateError(f"{call}: group {k} has codecs {group['codecs']!r}; {peer.library} keeps float32 states")
