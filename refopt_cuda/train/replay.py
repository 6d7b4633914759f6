"""Sampled steps, taken again by the NumPy reference while the run goes on, and compared word by word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import refopt
from refopt.spec import Box
from refopt_cuda.optim import Composed, settings
from refopt_cuda.optim.run import words

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
        self.rows: Any = ...
        if self.p.ndim > 1 and self.p.numel() > MOST:
            self.rows = slice(0, max(1, MOST // (self.p.numel() // self.p.shape[0])))
        state = self.opt.state.get(self.p, {})
        self.t = int(state.get("step", 0))
        self.weights, self.gradient = self._words(self.p), self._words(self.p.grad)
        self.kept = self._kept(state)

    def agrees(self) -> bool:
        """Whether weights and states hold the bits that `refopt.Optimizer` computes."""
        opt = self._reference()
        state = {"t": self.t} | {s.name: self._stored(opt, s, self.kept) for s in opt.states}
        (p,), (new,) = opt.step([self.weights], [self.gradient], [state])
        after = self._kept(self.opt.state[self.p])
        same = [_same(self._words(self.p), p)]
        for s in opt.states:
            have, want = self._stored(opt, s, after), new[s.name]
            parts = [(have.arrays[n], want.arrays[n]) for n in want.arrays] if isinstance(want, Box) else [(have, want)]
            same += [_same(a, b) for a, b in parts]
        return all(same)

    def _words(self, x: Any) -> np.ndarray:
        return x.detach()[self.rows].float().cpu().numpy().copy()

    def _kept(self, state: Any) -> dict[str, np.ndarray]:
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        return {k: words(v[self.rows if v.ndim else ...].cpu()).copy() for k, v in tensors.items()}

    def _reference(self) -> refopt.Optimizer:
        ours = isinstance(self.opt, Composed)
        rule = refopt.rules.RULES[self.group["rule"] if ours else type(self.opt).__name__.lower()]
        known = {(h.torch or h.name).partition("[")[0] for h in rule.hypers}
        hyper = {k: v for k, v in self.group.items() if k in known}
        if not ours or not settings.eligible(self.p, self.group["min_size"]):
            return refopt.Optimizer(rule, **hyper)
        records = {role: refopt.codecs.CODECS[stem] for role, stem in self.group["codecs"].items()}
        sized = {r: c(block=self.group["block"]) if c.scope == "block" else c for r, c in records.items()}
        return refopt.Optimizer(rule, sized, **hyper)

    def _stored(self, opt: refopt.Optimizer, state: Any, kept: dict[str, np.ndarray]) -> Any:
        """A state in the reference's form; zero where there is none yet."""
        codec = opt.codecs[state.name]
        if codec.stem == "f32":
            return kept.get(state.torch, np.zeros_like(self.weights))
        zero = opt.init([self.weights])[0][state.name]
        block = codec.scope == "block"
        keys = {n: f"{state.name}.{n}" if block else state.torch for n in zero.arrays}
        if not all(key in kept for key in keys.values()):
            return zero
        return Box(zero.codec, zero.shape, {n: kept[key] for n, key in keys.items()})


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    """Every bit the same; NaN equals NaN, whose payload no operation fixes."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.dtype.kind != "f":
        return bool(np.array_equal(a, b))
    words = f"u{a.dtype.itemsize}"
    return bool(((a.view(words) == b.view(words)) | (np.isnan(a) & np.isnan(b))).all())
