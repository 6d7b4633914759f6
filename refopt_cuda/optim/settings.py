"""What a parameter group holds, in torch's words, and what a rule is given, in its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from refopt.codecs import CODECS as RECORDS
from refopt.rules import RULES
from refopt.spec import Codec, Hyper, Rule, State
from refopt_cuda.codecs import CODECS
from refopt_cuda.rules import RULES as KERNELS
from refopt_cuda.rules import hypers

WORDS = {"f32": torch.float32, "bf16": torch.bfloat16}
"""Element codecs of states, as the dtype that a state tensor has."""
OPTIONS = ("block", "layout", "signed", "nonfinite")
"""What a codec's record can be given; this package has a fast path for the defaults, and for any block."""
NOTHING = np.zeros(0, np.float32)


class Field(NamedTuple):
    """Where a parameter group holds one hyper-parameter: a key, the place in a pair, and the pair's length."""

    name: str
    hyper: Hyper
    key: str
    at: int | None
    of: int


@cache
def _fields(stem: str) -> tuple[Field, ...]:
    """The rule's hyper-parameters as groups hold them; errors name `weight_decay` and `betas[0]`, not wd and beta1."""
    words = [(h, h.torch or h.name) for h in RULES[stem].hypers if h.name in hypers(stem)]
    keys = [word.partition("[")[0] for _, word in words]
    places = [int(word[:-1].partition("[")[2]) if "[" in word else None for _, word in words]
    rows = zip(words, keys, places, strict=True)
    return tuple(Field(h.name, replace(h, name=word), key, at, keys.count(key)) for (h, word), key, at in rows)


def torch_words(rule: Rule) -> dict[str, Any]:
    """The rule's defaults under torch's names: weight_decay, betas ..."""
    out: dict[str, Any] = {}
    for f in _fields(rule.stem):
        out[f.key] = f.hyper.default if f.at is None else (*out.get(f.key, ()), f.hyper.default)
    return out


def hyper_of(rule: Rule, group: Mapping[str, Any], call: str) -> dict[str, Any]:
    """The rule's hyper-parameters from a parameter group, checked; ValueError or TypeError names the one at fault."""
    out = {}
    for f in _fields(rule.stem):
        value = group[f.key]
        if f.at is not None:
            if not isinstance(value, tuple | list) or len(value) != f.of:
                raise ValueError(f"{call}: {f.key} must be {f.of} numbers, got {value!r}")
            value = value[f.at]
        out[f.name] = number(value, f.key, call)
        f.hyper.check(call, out[f.name])
    if rule.together is not None:
        rule.together(call, out)
    return out


def roles(rule: Rule, hyper: Mapping[str, Any]) -> tuple[State, ...]:
    """The states that a run with these hyper-parameters keeps; SGD without momentum keeps none."""
    kept = rule.init(NOTHING, **hyper)
    return tuple(s for s in rule.states if s.name in kept)


def number(value: Any, name: str, call: str) -> Any:
    """A tensor of one element as a float; one on a GPU would make every step wait for the device."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.numel() != 1 or value.device.type != "cpu":
        got = f"{tuple(value.shape)} on {value.device}"
        raise ValueError(f"{call}: {name} must be a number or a CPU tensor of one element, got {got}")
    return float(value)


def codec_names(rule: Rule, given: Any, usual: Mapping[str, str], call: str) -> dict[str, str]:
    """A codec stem for each state of the rule: what the caller named, else the usual one."""
    table: dict[str, Any] = dict(usual)
    if isinstance(given, Mapping):
        for role, codec in given.items():
            if role == "p":
                raise ValueError(f"{call}: codecs['p'] = {codec!r} is not available; weights keep their own dtype")
            if role not in table:
                raise ValueError(f"{call}: {rule.stem} has no role {role!r}; it has {', '.join(table)}")
        table |= given
    elif given is not None:
        table = dict.fromkeys(table, given)
    return {role: stem(codec, call) for role, codec in table.items()}


def stem(codec: Any, call: str) -> str:
    """The stem of a codec given by name or by record."""
    name = codec.stem if isinstance(codec, Codec) else codec
    if not isinstance(name, str) or name not in CODECS:
        none = "no kernel for codec" if name in tuple(RECORDS) else "no codec"
        raise ValueError(f"{call}: {none} {name!r}; there are {', '.join(CODECS)}")
    if isinstance(codec, Codec) and codec != RECORDS[name]:
        usual = RECORDS[name]
        changed = [f"{o}={getattr(codec, o)!r}" for o in OPTIONS if getattr(codec, o) != getattr(usual, o)]
        changed += [f"{o}={value!r}" for o, value in codec.mode.items() if value != usual.mode.get(o)]
        raise ValueError(
            f"{call}: codecs has {name} with {', '.join(changed)}; of a codec's options only the block size can be "
            f"chosen, for all states: pass block={codec.block or usual.block}"
        )
    return name


def check_group(rule: Rule, group: Mapping[str, Any], call: str) -> None:
    """ValueError for a block, a limit or a table of codecs that no state can be kept with."""
    for name, low in (("block", 1), ("min_size", 0)):
        value = group[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{call}: {name} must be a whole number >= {low}, got {value!r}")
    codecs, names = group["codecs"], [s.name for s in rule.states]
    if not isinstance(codecs, Mapping) or set(codecs) != set(names) or any(c not in [*CODECS] for c in codecs.values()):
        raise ValueError(
            f"{call}: codecs must give each of {', '.join(names)} one of {', '.join(CODECS)}, got {codecs!r}"
        )


def rule_named(rule: Any, call: str) -> Rule:
    """The record of a rule given by name or by record."""
    name = rule.stem if isinstance(rule, Rule) else rule
    if not isinstance(name, str) or name not in KERNELS:
        none = "no kernel for rule" if name in RULES else "no rule"
        raise ValueError(f"{call}: {none} {name!r}; there are {', '.join(KERNELS)}")
    return RULES[name]


def eligible(p: torch.Tensor, min_size: int) -> bool:
    """Whether a parameter's states are coded: matrices of some size, and vectors only if they are very long."""
    if p.ndim >= 2:
        return p.shape[-1] >= 16 and p.numel() >= min_size
    return p.numel() >= max(min_size, 65536) or min_size == 0
