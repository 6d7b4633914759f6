"""The optimizers that are compared: by name, with their learning rates, and what their states cost in bytes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import refopt
from refopt_cuda import optim
from refopt_cuda.codecs import STATES, WEIGHTS
from refopt_cuda.optim import settings, sharded, states, whole_places
from refopt_cuda.optim.whole import Whole
from refopt_cuda.train.errors import InputError

DEFAULT = ("torch.AdamW", "AdamW", "AdamW8bit", "Lion8bit", "AdamW:v=int8_linear")

WORDS: dict[str, dict[str, Any]] = {
    "adamw": {"rate": 1.0, "betas": (0.9, 0.99), "weight_decay": 0.1},
    "adam": {"rate": 1.0, "betas": (0.9, 0.99), "weight_decay": 0.0},
    "lion": {"rate": 0.2, "betas": (0.9, 0.99), "weight_decay": 0.5},
    "sgd": {"rate": 40.0, "momentum": 0.9},
    "adafactor": {"rate": 1.0, "relative_step": False, "scale_parameter": False, "weight_decay": 0.1},
}
"""For each rule: its learning rate as a multiple of --lr, and what else it is given."""

KEPT = ("8bit", "4bit", "Fp8")
"""How a class says what its states are kept in."""
NAMES = (
    "AdamW",
    "AdamW8bit",
    "AdamW4bit",
    "AdamWFp8",
    "Lion",
    "Lion8bit",
    "Adam",
    "Adam8bit",
    "SGD",
    "SGD8bit",
    "Adafactor",
)
OURS = tuple(name for name in NAMES if hasattr(optim, name))
TORCH = ("AdamW", "Adam", "SGD")


@dataclass(frozen=True)
class Subject:
    """One optimizer: a class of `refopt_cuda.optim` or `torch.optim`, and codecs that differ from the class's own."""

    name: str
    cls: str
    torchs: bool = False
    codecs: dict[str, str] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        return _rule(self.cls)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights: bfloat16 where a format of weights keeps the rest of them."""
        return torch.bfloat16 if "p" in self.codecs else torch.float32

    def rate(self, lr: float) -> float:
        """This rule's learning rate where AdamW's is `lr`."""
        return lr * float(WORDS[self.rule]["rate"])

    def make(
        self, params: Iterable[torch.nn.Parameter], lr: float, place: str = "resident", folder: Path | None = None
    ) -> torch.optim.Optimizer:
        """The optimizer over these parameters; in this place, if it is one that takes a place, on disk in `folder`."""
        words = {k: v for k, v in WORDS[self.rule].items() if k != "rate"} | {"lr": self.rate(lr)}
        if self.torchs:
            return getattr(torch.optim, self.cls)(params, **words)
        words |= {"codecs": self.codecs} if self.codecs else {}
        params, cls = list(params), getattr(optim, self.cls)
        whole = place in whole_places.PLACES and not any(map(sharded.is_sharded, params))
        if whole or issubclass(cls, optim.Composed):
            words |= {"place": place} | ({"path": folder} if place == "disk" else {})
        return cls(params, **words)


def _rule(cls: str) -> str:
    """The stem behind a class's name."""
    for kept in KEPT:
        cls = cls.removesuffix(kept)
    return cls.lower()


def parse(name: str) -> Subject:
    """`AdamW8bit`, `torch.AdamW`, or a class with codecs for single roles: `AdamW:v=int8_linear,m=bf16`."""
    cls, _, options = name.partition(":")
    if "," in cls:
        raise InputError(f"--optimizers: names stand apart with spaces, as in AdamW AdamW8bit, got {name!r}")
    if cls.startswith("torch."):
        if cls.removeprefix("torch.") not in TORCH or options:
            raise InputError(f"--optimizers: no optimizer {name!r}; of torch.optim there are {', '.join(TORCH)}")
        return Subject(name, cls.removeprefix("torch."), torchs=True)
    if cls not in OURS:
        known = [*OURS, *(f"torch.{c}" for c in TORCH)]
        lower = {k.lower(): k for k in known}
        near = difflib.get_close_matches(cls.lower(), lower, 1, 0.5)
        hint = f" (did you mean {lower[near[0]]}?)" if near else ""
        raise InputError(f"--optimizers: no optimizer {cls!r}{hint}; there are {', '.join(known)}")
    return Subject(name, cls, codecs=_codecs(name, cls, options))


def _codecs(name: str, cls: str, options: str) -> dict[str, str]:
    if options and issubclass(getattr(optim, cls), Whole):
        raise InputError(f"--optimizers: {cls} keeps its states in float32 and takes no codec, got {name!r}")
    roles: dict[str, Any] = {s.name: STATES for s in refopt.rules.RULES[_rule(cls)].states} | {"p": WEIGHTS}
    out = {}
    for option in filter(None, options.split(",")):
        role, _, codec = option.partition("=")
        if role not in roles or codec not in roles[role]:
            *states, _ = roles
            raise InputError(
                f"--optimizers: {option!r} in {name!r} must be ROLE=CODEC; states are {', '.join(states)}, "
                f"codecs {', '.join(STATES)}; weights are p, codecs {', '.join(WEIGHTS)}"
            )
        out[role] = codec
    return out


def parse_all(names: Iterable[str]) -> list[Subject]:
    """Every subject of a list, refused where one is named twice."""
    subjects = [parse(name) for name in names]
    seen = [s.name for s in subjects]
    for name in seen:
        if seen.count(name) > 1:
            raise InputError(f"--optimizers: {name} is named twice")
    if not subjects:
        raise InputError("--optimizers: names no optimizer")
    return subjects


def state_bytes(opt: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that the optimizer keeps, on this rank; a step count has no size and is not counted.

    What is saved is looked at: from a look at `opt.state` on, every step would compare where its tensors lie.
    """
    kept = opt.state_dict()["state"].values()
    tensors = [x for state in kept for x in state.values() if isinstance(x, torch.Tensor) and x.ndim]
    return sum(x.numel() * x.element_size() for x in map(sharded.local, tensors))


def bytes_for(subject: Subject, shapes: Iterable[tuple[int, ...]]) -> int:
    """Exact bytes of the states for parameters of these shapes; nothing is allocated."""
    params = [torch.nn.Parameter(torch.empty(s, device="meta", dtype=subject.dtype)) for s in shapes]
    if not subject.torchs:
        opt: Any = subject.make([torch.nn.Parameter(torch.empty(1, dtype=subject.dtype))], 1e-3)
        (group,) = opt.param_groups
        if isinstance(opt, Whole):
            hyper = opt.hyper(group, "bytes_for")
            kept = [opt.layout(p, hyper, group)[1] for p in params]
        else:
            hyper = settings.hyper_of(opt.rule, group, "bytes_for")
            kept = [states.layout(opt.rule, hyper, group, p) for p in params]
        parts = [part for layout in kept for part in layout.all]
        return sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
    opt = subject.make(params, 1e-3)
    for p in params:
        p.grad = torch.empty_like(p)
    opt.step()
    return state_bytes(opt)
