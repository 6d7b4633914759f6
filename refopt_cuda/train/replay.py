"""Sampled steps, taken again by the NumPy reference while the run goes on, and compared word by word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import refopt
from refopt.rules import RULES
from refopt.spec import Box, Codec
from refopt_cuda.optim import Composed, settings
from refopt_cuda.optim.run import words
from refopt_cuda.optim.whole import Whole

NOTHING = np.zeros(0, np.float32)
MOST = 1 << 16
"""Elements of one sample: whole rows of a larger tensor, whose blocks lie in rows."""


def chosen(steps: int, samples: int, seed: int) -> np.ndarray:
    """Which steps are replayed: the first, the last, and others drawn without repetition."""
    samples = min(samples, steps)
    inner = np.random.default_rng(seed).permutation(np.arange(2, steps))[: max(samples - 2, 0)]
    return np.sort(np.concatenate([[1, steps][:samples], inner]).astype(int))


@dataclass
class Replay:
    """One parameter's step: what went in is kept by `before`; `agrees` takes the step in NumPy and compares."""

    opt: torch.optim.Optimizer
    p: torch.nn.Parameter

    def before(self) -> None:
        """Copy the weights, the gradient and the states that the step is about to read."""
        self.group = next(g for g in self.opt.param_groups if any(q is self.p for q in g["params"]))
        self.ours = isinstance(self.opt, Composed)
        self.rule = RULES[self.group["rule"] if self.ours else type(self.opt).__name__.lower()]
        self.rows: Any = ...
        if self.p.ndim > 1 and self.p.numel() > MOST and self.rule.scope == "element":
            self.rows = slice(0, max(1, MOST // (self.p.numel() // self.p.shape[0])))
        state = self.opt.state.get(self.p, {})
        self.t = int(state.get("step", 0))
        self.weights, self.gradient = self._words(self.p), self._words(self.p.grad)
        self.kept = self._kept(state)

    def agrees(self) -> bool:
        """Whether weights and states hold the bits that `refopt.Optimizer` computes."""
        opt, k = self._reference(), self._number()
        zero, none = opt.init([NOTHING])[0], [None] * k  # random bits go by a parameter's number
        state = {"t": self.t, **self._stored(opt, self.kept)}
        p, new = opt.step([NOTHING] * k + [self.weights], [*none, self.gradient], [zero] * k + [state])
        have, want = self._stored(opt, self._kept(self.opt.state[self.p])), new[-1]
        pairs = [(self._words(self.p), p[-1])]
        for name, x in have.items():
            boxed = isinstance(x, Box)
            pairs += [(x.arrays[n], want[name].arrays[n]) for n in x.arrays] if boxed else [(x, want[name])]
        return all(_same(a, b) for a, b in pairs)

    def _number(self) -> int:
        every = [p for group in self.opt.param_groups for p in group["params"]]
        return next(k for k, p in enumerate(every) if p is self.p)

    def _words(self, x: Any) -> np.ndarray:
        return x.detach()[self.rows].float().cpu().numpy().copy()

    def _kept(self, state: Any) -> dict[str, np.ndarray]:
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        return {k: words(v[self.rows if v.ndim else ...].cpu()).copy() for k, v in tensors.items()}

    def _reference(self) -> refopt.Optimizer:
        if isinstance(self.opt, Whole):
            return refopt.Optimizer(self.rule, **self.opt.hyper(self.group, "replay"))
        known = {(h.torch or h.name).partition("[")[0] for h in self.rule.hypers}
        hyper = {k: v for k, v in self.group.items() if k in known}
        if not self.ours:
            return refopt.Optimizer(self.rule, **hyper)
        coded = settings.eligible(self.p, self.group["min_size"])
        table = {role: text for role, text in self.group["codecs"].items() if self._follows(role, coded)}
        return refopt.Optimizer(
            self.rule, {r: self._record(t) for r, t in table.items()}, seed=self.group["seed"], **hyper
        )

    def _follows(self, role: str, coded: bool) -> bool:
        return self.p.dtype == torch.bfloat16 if role == "p" else coded

    def _record(self, text: str) -> Codec:
        """The reference's codec for the words of a parameter group; what is signed, the rule knows."""
        form, block = settings.coding(text, self.group["block"], False)
        options = {name: choice for name, choice in form.options.items() if name != "signed"}
        return refopt.codecs.CODECS[form.stem](**options, **({"block": block} if block else {}))

    def _stored(self, opt: refopt.Optimizer, kept: dict[str, np.ndarray]) -> dict[str, Any]:
        """States, and what lies beside the weights, in the reference's form; zero where there is none yet."""
        zeros = opt.init([self.weights])[0]
        words = {s.name: s.torch or s.name for s in self.rule.states}
        out: dict[str, Any] = {}
        for name, zero in zeros.items():
            if isinstance(zero, Box):
                alone = name != "p" and zero.codec.scope == "element"
                keys = {n: words[name] if alone else f"{name}.{n}" for n in zero.arrays}
                found = {n: kept[key].view(zero.arrays[n].dtype) for n, key in keys.items() if key in kept}
                out[name] = Box(zero.codec, zero.shape, found) if len(found) == len(keys) else zero
            elif name != "t":
                out[name] = kept.get(words[name], zero)
        return out


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Every bit the same; NaN equals NaN, whose payload no operation fixes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    words = f"u{a.dtype.itemsize}"
    return bool(((a.view(words) == b.view(words)) | (np.isnan(a) & np.isnan(b))).all())
