"""What a parameter group holds, in torch's words, and what a rule is given, in its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from refopt.rules import RULES
from refopt.spec import Codec, Rule
from refopt_cuda.codecs import CODECS

WORDS = {"f32": torch.float32, "bf16": torch.bfloat16}
"""Element codecs of states, as the dtype that a state tensor has."""


def torch_words(rule: Rule) -> dict[str, Any]:
    """The rule's defaults under torch's names: weight_decay, betas ..."""
    out: dict[str, Any] = {}
    for h in rule.hypers:
        name, _, index = (h.torch or h.name).partition("[")
        if index:
            out[name] = (*out.get(name, ()), h.default)
        else:
            out[name] = h.default
    return out


def hyper_of(rule: Rule, group: Mapping[str, Any], call: str) -> dict[str, Any]:
    """The rule's hyper-parameters from a parameter group, checked; ValueError or TypeError names the one at fault."""
    out = {}
    for h in rule.hypers:
        name, _, index = (h.torch or h.name).partition("[")
        value = group[name]
        if index:
            if not isinstance(value, tuple | list) or len(value) != sum(
                o.torch.startswith(f"{name}[") for o in rule.hypers
            ):
                raise ValueError(f"{call}: {name} must be a pair of numbers, got {value!r}")
            value = value[int(index[:-1])]
        out[h.name] = number(value, name, call)
    return rule.check(call, out)


def number(value: Any, name: str, call: str) -> Any:
    """A tensor of one element as a float; one on a GPU would make every step wait for the device."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1 or value.device.type != "cpu":
        got = f"{tuple(value.shape)} on {value.device}"
        raise ValueError(f"{call}: {name} must be a number or a CPU tensor of one element, got {got}")
    return float(value)


def codec_names(rule: Rule, given: Any, usual: str | None, call: str) -> dict[str, str]:
    """A codec stem for each state of the rule: what the caller named, else the class's own, else float32."""
    roles = {s.name: usual or "f32" for s in rule.states}
    if isinstance(given, Mapping):
        for role, codec in given.items():
            if role == "p":
                raise ValueError(f"{call}: codecs['p'] = {codec!r} is not available; weights keep their own dtype")
            if role not in roles:
                raise ValueError(f"{call}: {rule.stem} has no role {role!r}; it has {', '.join(roles)}")
        roles |= given
    elif given is not None:
        roles = dict.fromkeys(roles, given)
    return {role: stem(codec, call) for role, codec in roles.items()}


def stem(codec: Any, call: str) -> str:
    """The stem of a codec given by name or by record."""
    name = codec.stem if isinstance(codec, Codec) else codec
    if name not in CODECS:
        raise ValueError(f"{call}: no codec {name!r}; there are {', '.join(CODECS)}")
    return str(name)


def rule_named(rule: Any, call: str) -> Rule:
    """The record of a rule given by name or by record."""
    name = rule.stem if isinstance(rule, Rule) else rule
    if name not in RULES:
        raise ValueError(f"{call}: no rule {name!r}; there are {', '.join(RULES)}")
    return RULES[name]


def eligible(p: torch.Tensor, min_size: int) -> bool:
    """Whether a parameter's states are coded: matrices of some size, and vectors only if they are very long."""
    if p.ndim >= 2:
        return p.shape[-1] >= 16 and p.numel() >= min_size
    return p.numel() >= max(min_size, 65536) or min_size == 0
