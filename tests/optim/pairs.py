"""A torch optimizer beside the reference: the same weights, gradients and steps, compared as words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.codecs import named
from tests.bits import same_bits
from tests.strategies import log_uniform

ADAM = {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7}
HEAVY = {"lr": 0.03, "momentum": 0.85, "weight_decay": 0.07}
SHAPES = [
    (64, 128),
    (33, 200),
    (300, 16),
    (16, 8, 40),
    (512, 15),
    (63, 64),
    (7,),
    (65536,),
    (65535,),
    (),
    (0,),
    (0, 64),
]
"""Coded: whole blocks, ragged rows, rows below a block, three dimensions. Not coded: short rows, small, vectors."""


class Case(NamedTuple):
    """A class with hyper-parameters that no two rules, or readings of one rule, share."""

    name: str
    rule: str
    words: dict[str, Any]
    label: str = ""

    def make(self, params: Any, **more: Any) -> Any:
        return getattr(rc.optim, self.name)(params, **(self.words | more))

    def codec(self, role: str) -> str:
        return "dynamic8" if self.name.endswith("8bit") else "f32"

    def __str__(self) -> str:
        return self.label or self.name


PLAIN = [
    Case("SGD", "sgd", {"lr": 0.03, "weight_decay": 0.07}, "SGD-plain"),
    Case("SGD", "sgd", HEAVY | {"dampening": 0.2}),
    Case("SGD", "sgd", HEAVY | {"nesterov": True}, "SGD-nesterov"),
    Case("Adam", "adam", ADAM | {"weight_decay": 0.06}),
    Case("AdamW", "adamw", ADAM | {"weight_decay": 0.11}),
    Case("AdamW", "adamw", ADAM | {"weight_decay": 0.11, "maximize": True}, "AdamW-maximize"),
    Case("Lion", "lion", {"lr": 0.003, "betas": (0.85, 0.95), "weight_decay": 0.2}),
]
CODED = [c._replace(name=f"{c.name}8bit", label=str(c).replace(c.name, f"{c.name}8bit")) for c in PLAIN]
CASES = PLAIN + CODED


def coded(shape: Sequence[int], min_size: int = 4096) -> bool:
    """Which tensors are coded, as the specification has it (4.0)."""
    n = math.prod(shape)
    return (len(shape) > 1 and shape[-1] >= 16 and n >= min_size) or (len(shape) == 1 and n >= 65536)


def weights(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: str, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [parameter(torch.from_numpy(log_uniform(rng, s, -3, 0)), dtype, device) for s in shapes]


def parameter(x: torch.Tensor, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    return torch.nn.Parameter(x.to(device, dtype))


def gradient(p: torch.Tensor, seed: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Sizes from 1e-6 to 1, zeros among them."""
    rng = np.random.default_rng(seed)
    g = log_uniform(rng, tuple(p.shape), -6, 0)
    g.reshape(-1)[rng.random(g.size) < 0.1] = 0
    return torch.from_numpy(g).to(p.device, dtype or p.dtype)


def give(params: Sequence[Any], seed: int) -> None:
    """A gradient for each parameter."""
    for k, p in enumerate(params):
        p.grad = gradient(p, 1000 * seed + k)


def exact(x: torch.Tensor) -> np.ndarray:
    """A copy of a tensor's values, as float32."""
    return x.detach().float().cpu().numpy().copy()


def stored(x: torch.Tensor) -> np.ndarray:
    """A tensor's words."""
    x = x.detach().cpu()
    return x.view(torch.int16).numpy().view(np.uint16) if x.dtype == torch.bfloat16 else x.numpy()


def record(text: str, block: int | None = None) -> Any:
    """The reference's codec for a name of `refopt_cuda.codecs`: "dynamic8", "fp8.e5m2", "q4:64"."""
    name, _, own = text.partition(":")
    form = named(name)
    found, options = refopt.codecs.CODECS[form.stem], {k: v for k, v in form.options.items() if k != "signed"}
    size = int(own) if own else block
    return found(**options, **({"block": size} if size and found.scope == "block" else {}))


class Mirror:
    """One parameter in the reference; `step` takes what the torch side took, `agrees` compares p and every state."""

    def __init__(
        self, case: Case, param: Any, min_size: int = 4096, block: int | None = None, number: int = 0, **codecs: str
    ) -> None:
        table = {s.name: codecs.get(s.name, case.codec(s.name)) for s in refopt.rules.RULES[case.rule].states}
        given = {role: record(text, block) for role, text in table.items()} if coded(param.shape, min_size) else {}
        if "p" in codecs and param.dtype == torch.bfloat16:
            given["p"] = record(codecs["p"])
        self.opt = refopt.Optimizer(case.rule, given, **case.words)
        self.p, self.dtype, self.number = exact(param), param.dtype, number
        self.state = self.opt.init([self.p])

    def step(self, g: torch.Tensor) -> None:
        self.p, state = self.opt._apply(
            self.number, self.p, exact(g), self.state[0], self.opt.hyper
        )  # random bits go by number
        self.state = [state]
        self.p = torch.from_numpy(self.p).to(self.dtype).float().numpy()

    def agrees(self, p: Any, state: dict[str, Any], what: str) -> None:
        same_bits(exact(p), self.p, f"{what}: p")
        assert state["step"] == self.state[0]["t"], f"{what}: step {state['step']}"
        kept = [s.name for s in self.opt.states] + (["p"] if "p" in self.state[0] else [])
        for name in kept:
            want = self.state[0][name]
            if isinstance(want, refopt.Box) and (want.codec.scope == "block" or name == "p"):
                for part, array in want.arrays.items():
                    same_bits(stored(state[f"{name}.{part}"]), array, f"{what}: {name}.{part}")
            else:
                array = want.codes if isinstance(want, refopt.Box) else want
                key = next(s.torch or s.name for s in self.opt.states if s.name == name)
                same_bits(stored(state[key]), array, f"{what}: {key}")


def walk(case: Case, params: list[Any], steps: int, opt: Any = None, **codecs: str) -> Any:
    """Step both sides together, comparing after each step."""
    opt = opt or case.make(params)
    mirrors = [Mirror(case, p, number=k, **codecs) for k, p in enumerate(params)]
    for t in range(steps):
        give(params, t)
        opt.step()
        for k, (p, mirror) in enumerate(zip(params, mirrors, strict=True)):
            mirror.step(p.grad)
            mirror.agrees(p, opt.state[p], f"{case}, step {t + 1}, tensor {k} {tuple(p.shape)}")
    return opt


def snapshot(opt: Any) -> Any:
    """A copy of all that a step writes."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return [
        (p.detach().clone(), {k: v.clone() if torch.is_tensor(v) else v for k, v in opt.state.get(p, {}).items()})
        for p in params
    ]


def unchanged(opt: Any, before: Any) -> None:
    """Assert that nothing was written since the snapshot."""
    for k, ((p, state), (q, was)) in enumerate(zip(snapshot(opt), before, strict=True)):
        assert torch.equal(p, q), f"tensor {k} was written"
        assert state.keys() == was.keys(), f"tensor {k}: state {sorted(state)} for {sorted(was)}"
        for key in was:
            same = torch.equal(state[key], was[key]) if torch.is_tensor(was[key]) else state[key] == was[key]
            assert same, f"tensor {k}: {key} was written"
