"""What a parameter group holds, in torch's words, and what a rule is given, in its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

from refopt.codecs import CODECS as RECORDS
from refopt.rules import RULES
from refopt.spec import Codec, Hyper, Rule
from refopt_cuda.codecs import STATES, WEIGHTS, Form, named
from refopt_cuda.rules import RULES as KERNELS
from refopt_cuda.rules import hypers

WORDS = {"f32": torch.float32, "bf16": torch.bfloat16}
"""Element codecs of states, as the dtype that a state tensor has."""
ONE = np.zeros(1, np.float32)
FLAT = (
    "its blocks run through the flattened tensor, as checkpoints of frozen weights have them; q4 keeps states in 4 bits"
)
WITHOUT = {
    "fp8_expand": "every element takes powers of float64, whose last bits are each machine's own: no bits to agree on",
    "nf4": FLAT,
    "fp4": FLAT,
    "double": "its scales are coded, too, around a mean of all: of frozen weights",
}
"""Block codecs that no kernel keeps states in, and why."""


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
        out[f.name] = number(value, f.key, call, f.key == "lr" and group.get("capturable", False))
        if not isinstance(out[f.name], torch.Tensor):
            f.hyper.check(call, out[f.name])
    if rule.together is not None:
        rule.together(call, out)
    return out


def roles(rule: Rule, hyper: Mapping[str, Any]) -> dict[str, float]:
    """The states that a run with these hyper-parameters keeps, and what each starts at: nearly always 0."""
    return {name: float(x[0]) for name, x in rule.init(ONE, **hyper).items()}


def number(value: Any, name: str, call: str, stays: bool = False) -> Any:
    """A tensor of one element as a float; one on a GPU would make every step wait for the device, unless it `stays`."""
    if not isinstance(value, torch.Tensor):
        return value
    if stays and value.numel() == 1 and value.is_cuda and value.dtype in (torch.float32, torch.float64):
        return value
    if value.numel() != 1 or value.device.type != "cpu":
        got = f"{value.dtype}, {tuple(value.shape)} on {value.device}"
        more = ", or with capturable=True a float32 or float64 one on the GPU" if name == "lr" else ""
        raise ValueError(f"{call}: {name} must be a number or a CPU tensor of one element{more}, got {got}")
    return float(value)


def codec_names(rule: Rule, given: Any, usual: Mapping[str, str], call: str) -> dict[str, str]:
    """A codec for each state of the rule, and for the weights `p` if they have one: what the caller named, else the
    usual one; as words, with the block size behind a colon where a record chose one."""
    table: dict[str, Any] = dict(usual)
    if isinstance(given, Mapping):
        known = {s.name for s in rule.states} | {"p"}
        for role in given:
            if role not in known:
                has = ", ".join(s.name for s in rule.states)
                raise ValueError(f"{call}: {rule.stem} has no role {role!r}; it has {has} and p, the weights")
        table |= given
    elif given is not None:
        table |= dict.fromkeys((s.name for s in rule.states), given)
    return {role: words(role, codec, call) for role, codec in table.items()}


def words(role: str, codec: Any, call: str) -> str:
    """A codec by name or by record as words: "dynamic8", "fp8.e5m2", "q4:64"; ValueError for one without a kernel."""
    table, kind = (WEIGHTS, "format of weights") if role == "p" else (STATES, "codec")
    text = _of_record(codec, call) if isinstance(codec, Codec) else codec
    name, _, block = text.partition(":") if isinstance(text, str) else ("", "", "")
    stem = name.partition(".")[0]
    if stem not in table:
        none = f"no kernel for {kind}" if stem in RECORDS else f"no {kind}"
        why = f". {stem}: {WITHOUT[stem]}" if role != "p" and stem in WITHOUT else ""
        raise ValueError(f"{call}: {none} {text!r}; there are {', '.join(table)}{why}")
    try:
        named(name)
    except ValueError:
        forms = ", ".join(str(c) for choices in getattr(table[stem], "OPTIONS", {}).values() for c in choices)
        raise ValueError(f"{call}: {kind} {text!r}: {stem} takes {forms or 'no words'}") from None
    if block and (not block.isdecimal() or int(block) < 1 or not RECORDS[stem].block):
        raise ValueError(f"{call}: {kind} {text!r}: behind the colon stands a block size")
    return text


def _of_record(codec: Codec, call: str) -> str:
    """The words for a record; ValueError where it has options that no kernel knows."""
    usual, known = RECORDS[codec.stem], getattr(STATES.get(codec.stem) or WEIGHTS.get(codec.stem), "OPTIONS", {})
    chosen = {o: v for o, v in codec.mode.items() if v != usual.mode.get(o)}
    if codec.sign_asked:
        chosen["signed"] = codec.signed
    odd = [f"{o}={v!r}" for o, v in chosen.items() if o not in known or v not in known[o]]
    odd += [f"{o}={getattr(codec, o)!r}" for o in ("layout", "nonfinite") if getattr(codec, o) != getattr(usual, o)]
    if odd:
        takes = ", ".join(["block"] * bool(usual.block) + [o for o in known if o != "signed"]) or "no options"
        raise ValueError(f"{call}: codecs has {codec.stem} with {', '.join(odd)}; its kernels take {takes}")
    named_so = [f"un{o}" if v is False else o if v is True else str(v) for o, v in chosen.items()]
    return ".".join([codec.stem, *named_so]) + (f":{codec.block}" if codec.block != usual.block else "")


class Coding(NamedTuple):
    """How one role is kept: the form of its codec, and how many elements share a scale (0: no scale)."""

    form: Form
    block: int


def coding(text: str, block: int | None, nonnegative: bool) -> Coding:
    """What the words of `codec_names` say; `block` is the group's, if it has one."""
    name, _, own = text.partition(":")
    form = named(name, nonnegative)
    return Coding(form, (int(own) if own else block or RECORDS[form.stem].block or 0) if form.scaled else 0)


def check_group(rule: Rule, group: Mapping[str, Any], call: str, needed: Iterable[str] = ()) -> None:
    """ValueError for a block, a limit or a table of codecs that the needed states cannot be kept with."""
    for name, low in (("block", 1), ("min_size", 0)):
        value = group[name]
        if name == "block" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"{call}: {name} must be a whole number >= {low}, got {value!r}")
    codecs, names = group["codecs"], {s.name for s in rule.states} | {"p"}
    if not isinstance(codecs, Mapping) or not set(needed) <= set(codecs) <= names:
        raise ValueError(f"{call}: codecs must give each of {', '.join(needed)} a codec, got {codecs!r}")
    sizes = []
    for role, text in codecs.items():
        block = coding(words(role, text, call), group["block"], False)
        sizes += [block.block] if block.form.scaled else []
        if block.form.scaled and block.form.module.BITS == 4 and block.block % 2:
            raise ValueError(
                f"{call}: two codes of {block.form.stem} share a byte: block must be even, got {block.block}"
            )
    if any(max(sizes) % size for size in sizes):
        raise ValueError(f"{call}: the block sizes of one parameter's states must divide the largest, got {sizes}")


def of_param(group: Mapping[str, Any], p: torch.Tensor) -> Mapping[str, Any]:
    """A group's settings as they hold for one of its parameters; `overrides.py` says which may differ."""
    own = (own for k, own in group.get("overrides", {}).items() if group["params"][k] is p)
    return {**group, **next(own, {})}


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
