"""More that is wrong on purpose: what kernels do that were written for speed, as NumPy.

Each is what a library's kernel has been seen to do, or its source says; the suite must name it without the kernel.
`BROKEN_KERNELS` is read as `refopt.conform.broken.BROKEN` is.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

import numpy as np

from refopt.conform.broken import bfloat16, moments
from refopt.conform.target import Coded, FunctionalTarget, Target, decoded
from refopt.spec import Array, Rule

f32 = np.float32
HERE = "refopt.conform.broken_kernels:"
BLOCK, LEAST = 256, 4096


def power(beta: Any, t: int) -> Any:
    """beta^t as exp2(t log2(beta)), the logarithm off by what a GPU's fast one is."""
    return f32(2.0 ** (t * (log2(beta) + 2.0**-22)))


def fast_step(p: Array, g: Array, s: dict[str, Array], *, t: int, lr: float, beta1: float, beta2: float, eps: float,
              wd: float) -> Any:  # fmt: skip
    """AdamW whose scalars are float32 and whose weights decay last."""
    b1, b2, one = f32(beta1), f32(beta2), f32(1)
    with np.errstate(all="ignore"):
        m, v = b1 * s["m"] + (one - b1) * g, b2 * s["v"] + (one - b2) * (g * g)
        root = np.sqrt(one - power(b2, t))
        p = p - f32(lr) * root / (one - power(b1, t)) * (m / (np.sqrt(v) + f32(eps) * root))
    return p * (one - f32(lr) * f32(wd)), {"m": m, "v": v}


def adamw_by_fast_math() -> Target:
    return FunctionalTarget(moments, fast_step, HERE + "adamw_by_fast_math")


class Twice(FunctionalTarget):
    """The same on bfloat16 weights: what the step gives is rounded before it decays, and then it does not decay."""

    dtypes = ("bfloat16",)

    def _stepped(self, k: int, g: Array) -> tuple[Array, dict[str, Array]]:
        wd, self.hyper = self.hyper["wd"], self.hyper | {"wd": 0.0}
        p, state = super()._stepped(k, g)
        self.hyper["wd"] = wd
        return bfloat16(bfloat16(p) * (f32(1) - f32(self.hyper["lr"]) * f32(wd))), state


def adamw_rounds_twice() -> Target:
    return Twice(moments, fast_step, HERE + "adamw_rounds_twice")


def squares_decay(p: Array, g: Array, s: dict[str, Array], *, t: int, lr: float, alpha: float, eps: float,
                  wd: float) -> Any:  # fmt: skip
    """RMSprop that adds wd p to the gradient, squares it, and then steps along the gradient as it came."""
    decayed = g + f32(wd) * p
    v = f32(alpha) * s["v"] + f32(1 - alpha) * (decayed * decayed)
    return p - f32(lr) * (g / (np.sqrt(v) + f32(eps))), {"v": v}


def rmsprop_decays_its_squares() -> Target:
    name = HERE + "rmsprop_decays_its_squares"
    return FunctionalTarget(lambda p: {"v": np.zeros(p.shape, f32)}, squares_decay, name)


class SquaresInCodes(Target):
    """RMSprop with a kernel of its own for tensors in codes: decay enters the squares alone, 1 - alpha has lost digits.
    Small tensors are kept as they are, and decay."""

    name = HERE + "rmsprop_decays_its_squares_in_codes"
    TABLE = (np.arange(256, dtype=f32) / f32(255)) ** 2

    def refuses(self, rule: Rule, hyper: dict[str, Any]) -> list[str]:
        return [n for n in ("centered", "momentum") if hyper.get(n)]

    def start(self, rule: Rule, params: Sequence[Array], hyper: dict[str, Any], dtype: str = "float32") -> None:
        self.h, self.ps = hyper, [p.copy() for p in params]
        self.vs = [np.zeros(p.shape, f32) for p in params]
        self.codes: list[Coded | None] = [None for _ in params]

    def step(self, grads: Sequence[Array]) -> None:
        alpha, one = f32(self.h["alpha"]), f32(1)
        for k, (p, g) in enumerate(zip(self.ps, grads)):
            decayed, large = g + f32(self.h["wd"]) * p, p.size >= LEAST
            share = one - alpha if large else f32(1 - self.h["alpha"])
            v = self.vs[k] = alpha * self.vs[k] + share * (decayed * decayed)
            self.ps[k] = p - f32(self.h["lr"]) * ((g if large else decayed) / (np.sqrt(v) + f32(self.h["eps"])))
            if large:
                self.store(k)

    def store(self, k: int) -> None:
        """Codes of a mean of squares, and in its place what the next step will read."""
        x = self.vs[k].reshape(-1)
        scales = np.maximum.reduceat(x, np.arange(0, x.size, BLOCK))
        y = np.sqrt(x / np.maximum(np.repeat(scales, BLOCK)[: x.size], f32(1e-38)))
        self.codes[k] = c = Coded(np.rint(y * f32(255)).astype(np.uint8), scales, self.TABLE, BLOCK)
        self.vs[k] = decoded(c).reshape(self.vs[k].shape)

    def params(self) -> list[Array]:
        return [p.copy() for p in self.ps]

    def coded(self, k: int) -> dict[str, Coded]:
        return {} if (c := self.codes[k]) is None else {"v": c}

    def state(self, k: int) -> dict[str, Array]:
        return {"v": self.vs[k].copy()}


class Mix(Target):
    """AdEMAMix with its two means as attributes: what it shows of them is a subclass's matter."""

    def refuses(self, rule: Rule, hyper: dict[str, Any]) -> list[str]:
        return [n for n in ("t_alpha", "t_beta3") if hyper.get(n)]

    def start(self, rule: Rule, params: Sequence[Array], hyper: dict[str, Any], dtype: str = "float32") -> None:
        self.h, self.t, self.ps = hyper, 0, [p.copy() for p in params]
        self.means = [{n: np.zeros(p.shape, f32) for n in ("m1", "m2", "v")} for p in params]

    def step(self, grads: Sequence[Array]) -> None:
        h, self.t = self.h, self.t + 1
        c1, c2 = 1 - h["beta1"] ** self.t, (1 - h["beta2"] ** self.t) ** 0.5
        for k, g in enumerate(grads):
            s = self.means[k]
            with np.errstate(all="ignore"):
                m1: Array = f32(h["beta1"]) * s["m1"] + f32(1 - h["beta1"]) * g
                m2: Array = f32(h["beta3"]) * s["m2"] + f32(1 - h["beta3"]) * g
                v: Array = f32(h["beta2"]) * s["v"] + f32(1 - h["beta2"]) * (g * g)
                along = (m1 / f32(c1) + f32(h["alpha"]) * m2) / (np.sqrt(v) / f32(c2) + f32(h["eps"]))
            self.ps[k] = self.ps[k] * f32(1 - h["lr"] * h["wd"]) - f32(h["lr"]) * along
            self.means[k] = {"m1": m1, "m2": m2, "v": v}

    def params(self) -> list[Array]:
        return [p.copy() for p in self.ps]


class NoRoom(Mix):
    """Its second mean lies behind the end of a buffer of the single size, where nobody sees it."""

    name = HERE + "ademamix_has_no_room"

    def state(self, k: int) -> dict[str, Array]:
        return {n: self.means[k][n].copy() for n in ("m1", "v")}

    def nbytes(self, k: int) -> int | None:
        return 8 * self.ps[k].size


class Shifted(Mix):
    """Means in 255 even steps whose scales share a row: m2's begin at element n // 256, not at the next whole block."""

    name = HERE + "ademamix_shifts_its_scales"
    TABLE = (np.arange(256) - 127).clip(-127, 127).astype(f32) / f32(127)

    def start(self, rule: Rule, params: Sequence[Array], hyper: dict[str, Any], dtype: str = "float32") -> None:
        super().start(rule, params, hyper, dtype)
        self.codes: list[dict[str, Array]] = [{} for _ in params]
        self.scales = [np.zeros(2 * -(-p.size // BLOCK), f32) for p in params]

    def step(self, grads: Sequence[Array]) -> None:
        super().step(grads)
        for k, p in enumerate(self.ps):
            for first, n in ((0, "m1"), (p.size // BLOCK, "m2")) if p.size >= LEAST else ():
                self.store(k, n, first)

    def store(self, k: int, n: str, first: int) -> None:
        """Codes and scales of one mean, and in its place what its own kernel will read."""
        x = self.means[k][n].reshape(-1)
        scales = np.maximum.reduceat(np.abs(x), np.arange(0, x.size, BLOCK))
        y = x / np.maximum(np.repeat(scales, BLOCK)[: x.size], f32(1e-38)) * f32(127)
        self.codes[k][n] = (np.rint(y).astype(int) + 127).clip(0, 254).astype(np.uint8)
        self.scales[k][first : first + scales.size] = scales
        self.means[k][n] = decoded(Coded(self.codes[k][n], scales, self.TABLE, BLOCK)).reshape(self.ps[k].shape)

    def coded(self, k: int) -> dict[str, Coded]:
        m1, m2 = np.split(self.scales[k], 2)
        rows = {"m1": m1, "m2": m2}
        return {n: Coded(codes, rows[n].copy(), self.TABLE, BLOCK) for n, codes in self.codes[k].items()}

    def state(self, k: int) -> dict[str, Array]:
        plain = {n: x.copy() for n, x in self.means[k].items()}
        return plain | {n: decoded(c).reshape(self.ps[k].shape) for n, c in self.coded(k).items()}


rmsprop_decays_its_squares_in_codes = SquaresInCodes
ademamix_has_no_room = NoRoom
ademamix_shifts_its_scales = Shifted

BROKEN_KERNELS: dict[str, tuple[str, str]] = {
    "adamw_by_fast_math": ("adamw", "L1/base/decay-order-after+scalars-f32"),
    "adamw_rounds_twice": ("adamw", "L1/base@bfloat16/decay-ignored+scalars-f32"),
    "rmsprop_decays_its_squares": ("rmsprop", "L1/base/decay-skips-the-step"),
    "rmsprop_decays_its_squares_in_codes": ("rmsprop", "L1/base/one-minus-beta-f32+decay-skips-the-step"),
    "ademamix_has_no_room": ("ademamix", "L7/base/half-state"),
    "ademamix_shifts_its_scales": ("ademamix", "L1/base/short-block"),
}
"""Every one: the rule that it claims, and the first finding against it."""
