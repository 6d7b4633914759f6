"""torch.optim: SGD, Adam, AdamW, RMSprop and Adagrad, whose states are numbers; `factored` has Adafactor and Muon."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from refopt.spec import Rule, StateError
from refopt_cuda.convert import factored, walk
from refopt_cuda.convert.coded import Losses, values
from refopt_cuda.optim import states
from refopt_cuda.optim.composed import MEANING

CLASSES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "rmsprop": "RMSprop", "adagrad": "Adagrad"}


def from_torch(state_dict: Mapping[str, Any], opt: torch.optim.Optimizer) -> dict[str, Any]:
    """A state dict of torch.optim as one that `opt.load_state_dict` takes; `opt` is left as it is.

    state_dict  of torch.optim.SGD, Adam, AdamW, RMSprop, Adagrad, Adafactor or Muon; states in any floating dtype
    opt         the same rule over the same parameters, in the same groups. States that it codes are encoded, with a
                warning that says how many; float32 states pass bit for bit

    Settings come along. Raises StateError or ShapeError for the state of another rule, or of other shapes.
    """
    if peer := factored.of_torch(opt):
        return factored.read(state_dict, opt, peer, "from_torch")
    call, opt = "from_torch", walk.check_composed(opt, "from_torch")
    walk.refuse(opt.rule, CLASSES, call, "torch.optim")
    keys = {s.torch: s.name for s in opt.rule.states}

    def group(theirs: Mapping[str, Any], where: str) -> dict[str, Any]:
        for name, value in MEANING.get(opt.rule.stem, {}).items():
            if theirs.get(name, value) != value:
                raise StateError(f"{where} has {name} {theirs[name]!r}, which is not {opt.rule.stem}")
        return {name: theirs[name] for name in [*_words(opt.rule), "maximize"] if name in theirs}

    def entry(theirs: Mapping[str, Any], place: walk.Place, where: str) -> walk.Entry:
        for key in theirs:
            if key != "step" and key not in keys:
                raise StateError(f"{where} has {key!r}, which {opt.rule.stem} does not keep")
        return walk.Entry(states.count(theirs, where, 1), {keys[k]: x for k, x in theirs.items() if k != "step"})

    return walk.read(state_dict, opt, call, group, entry)


def to_torch(opt: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of `opt` as a state dict of the torch.optim class of the same name.

    Every state as float32 of the parameter's shape: codes are decoded, exactly. What lies beside bfloat16 weights
    stays behind, with a warning; torch casts the states of bfloat16 weights to bfloat16 when it loads them. Raises
    StateError for a rule, or a setting, that torch.optim does not have.
    """
    if peer := factored.of_torch(opt):
        return factored.write(opt, peer, "to_torch")
    call, opt = "to_torch", walk.check_composed(opt, "to_torch")
    name = walk.refuse(opt.rule, CLASSES, call, "torch.optim")
    usual = getattr(torch.optim, name)([torch.zeros(1)]).param_groups[0]
    keys = {s.name: s.torch for s in opt.rule.states}

    def group(ours: Mapping[str, Any], where: str) -> dict[str, Any]:
        walk.plain(ours, opt.rule, set(usual), where, "torch.optim")
        return {k: ours.get(k, v) for k, v in usual.items() if k != "params"}

    def entry(found: walk.Entry, place: walk.Place, losses: Losses) -> dict[str, Any]:
        kept = walk.without_bits(found, losses)
        out = {keys[role]: values(x).reshape(place.p.shape) for role, x in kept.items()}
        return out if opt.rule.stem == "sgd" else {"step": torch.tensor(float(found.step)), **out}

    return walk.write(opt, call, group, entry)


def _words(rule: Rule) -> list[str]:
    """What torch's groups call the hyper-parameters that both have."""
    return [
        key for key in getattr(torch.optim, CLASSES[rule.stem])([torch.zeros(1)]).param_groups[0] if key in _known(rule)
    ]


def _known(rule: Rule) -> set[str]:
    return {(h.torch or h.name).partition("[")[0] for h in rule.hypers}
