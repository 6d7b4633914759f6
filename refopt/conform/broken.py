"""Optimizers that are wrong on purpose, each in one way that has been seen: targets to try the suite on.

They are written for themselves, with no line of the reference in them. `BROKEN` says which rule each claims to follow
and what the suite must say of it. `conform.run("refopt.conform.broken:adamw_swaps_its_betas", "adamw")`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refopt.conform.target import Coded, FunctionalTarget, Target, decoded
from refopt.spec import Array, Rule

f32 = np.float32
Hyper = dict[str, Any]


def moments(p: Array, amsgrad: bool = False) -> dict[str, Array]:
    return {n: np.zeros(p.shape, f32) for n in (("m", "v", "w") if amsgrad else ("m", "v"))}


def momentum_of(p: Array) -> dict[str, Array]:
    return {"m": np.zeros(p.shape, f32)}


def sign(x: Array) -> Array:
    return (x > 0).astype(f32) - (x < 0).astype(f32)


def bfloat16(x: Array) -> Array:
    """Rounded to 8 bits of precision, ties to even."""
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(f32)


def adam_step(
    p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper, eps_at: str = "outside", correct: bool = True
) -> tuple[Array, dict[str, Array]]:
    """Adam without decay, as a program written in a hurry has it: float32 arrays, double scalars."""
    with np.errstate(all="ignore"):
        m = f32(h["beta1"]) * s["m"] + f32(1 - h["beta1"]) * g
        v = f32(h["beta2"]) * s["v"] + f32(1 - h["beta2"]) * g * g
        c1, c2 = (1 - h["beta1"] ** t, 1 - h["beta2"] ** t) if correct else (1.0, 1.0)
        if eps_at == "inside":
            d = np.sqrt(v / f32(c2) + f32(h["eps"]) / f32(c2))
        elif eps_at == "uncorrected":
            d = (np.sqrt(v) + f32(h["eps"])) / f32(c2**0.5)
        else:
            d = np.sqrt(v) / f32(c2**0.5) + f32(h["eps"])
        return p - f32(h["lr"] / c1) * (m / d), {"m": m, "v": v}


def right_adamw(p: Array, g: Array, s: dict[str, Array], *, t: int, lr: float, beta1: float, beta2: float,
                eps: float, wd: float) -> Any:  # fmt: skip
    """The one that is right, which the others are copies of."""
    return adam_step(p * f32(1 - lr * wd), g, s, t, {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps})


Update = Callable[..., tuple[Array, dict[str, Array]]]


def adamw(change: Callable[[Array, Array, dict[str, Array], int, Hyper], Any], name: str) -> Callable[[], Target]:
    """A target from a step that is handed all hyper-parameters as a dict."""

    def update(p: Array, g: Array, s: dict[str, Array], *, t: int, lr: float, beta1: float, beta2: float, eps: float,
               wd: float) -> Any:  # fmt: skip
        h = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "wd": wd}
        return change(p, g, s, t, h)

    return lambda: FunctionalTarget(moments, update, f"refopt.conform.broken:{name}")


def shrunk(p: Array, h: Hyper) -> Array:
    return p * f32(1 - h["lr"] * h["wd"])


def late(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> Any:
    p, s = adam_step(p, g, s, t, h)
    return shrunk(p, h), s


def in_bf16(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> Any:
    p, s = adam_step(shrunk(p, h), g, s, t, h)
    return p, {n: bfloat16(x) for n, x in s.items()}


def narrow_betas(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> Any:
    b1, b2 = f32(h["beta1"]), f32(h["beta2"])
    m, v = b1 * s["m"] + (f32(1) - b1) * g, b2 * s["v"] + (f32(1) - b2) * (g * g)
    d = np.sqrt(v) / f32((1 - h["beta2"] ** t) ** 0.5) + f32(h["eps"])
    return shrunk(p, h) - f32(h["lr"] / (1 - h["beta1"] ** t)) * (m / d), {"m": m, "v": v}


def without_tail(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> Any:
    """A kernel that walks whole blocks of 256."""
    new, states = adam_step(shrunk(p, h), g, s, t, h)
    whole = p.size // 256 * 256
    return np.where(np.arange(p.size).reshape(p.shape) < whole, new, p), states


def without_nan(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> Any:
    """NaN and Inf in a gradient are taken for zeros."""
    return adam_step(shrunk(p, h), np.where(np.isfinite(g), g, f32(0)), s, t, h)


def writes_gradient(p: Array, g: Array, s: dict[str, Array], t: int, h: Hyper) -> Any:
    out = adam_step(shrunk(p, h), g, s, t, h)
    g *= f32(0.5)
    return out


adamw_couples_its_decay = adamw(
    lambda p, g, s, t, h: adam_step(p, g + f32(h["wd"]) * p, s, t, h), "adamw_couples_its_decay"
)
adamw_decays_after = adamw(late, "adamw_decays_after")
adamw_swaps_its_betas = adamw(
    lambda p, g, s, t, h: adam_step(shrunk(p, h), g, s, t, h | {"beta1": h["beta2"], "beta2": h["beta1"]}),
    "adamw_swaps_its_betas",
)
adamw_has_eps_inside = adamw(
    lambda p, g, s, t, h: adam_step(shrunk(p, h), g, s, t, h, "inside"), "adamw_has_eps_inside"
)
adamw_adds_eps_too_early = adamw(
    lambda p, g, s, t, h: adam_step(shrunk(p, h), g, s, t, h, "uncorrected"), "adamw_adds_eps_too_early"
)
adamw_corrects_no_bias = adamw(
    lambda p, g, s, t, h: adam_step(shrunk(p, h), g, s, t, h, correct=False), "adamw_corrects_no_bias"
)
adamw_counts_from_two = adamw(lambda p, g, s, t, h: adam_step(shrunk(p, h), g, s, t + 1, h), "adamw_counts_from_two")
adamw_never_counts = adamw(lambda p, g, s, t, h: adam_step(shrunk(p, h), g, s, 1, h), "adamw_never_counts")
adamw_decays_without_lr = adamw(
    lambda p, g, s, t, h: adam_step(p * f32(1 - h["wd"]), g, s, t, h), "adamw_decays_without_lr"
)
adamw_keeps_bf16 = adamw(in_bf16, "adamw_keeps_bf16")
adamw_subtracts_in_float32 = adamw(narrow_betas, "adamw_subtracts_in_float32")
adamw_skips_the_tail = adamw(without_tail, "adamw_skips_the_tail")
adamw_swallows_nan = adamw(without_nan, "adamw_swallows_nan")
adamw_spoils_the_gradient = adamw(writes_gradient, "adamw_spoils_the_gradient")


class Forgets(FunctionalTarget):
    """AdamW whose checkpoint loses something."""

    def __init__(self, what: str, name: str) -> None:
        super().__init__(moments, right_adamw, f"refopt.conform.broken:{name}")
        self.what = what

    def save(self) -> Any:
        states, ts = super().save()
        if self.what == "t":
            return states, [0] * len(ts)
        return [s | {"v": np.zeros_like(s["v"])} for s in states], ts


def adamw_forgets_t() -> Target:
    return Forgets("t", "adamw_forgets_t")


def adamw_forgets_v() -> Target:
    return Forgets("v", "adamw_forgets_v")


class Hoards(FunctionalTarget):
    """AdamW that keeps a copy of the weights beside its states."""

    def nbytes(self, k: int) -> int | None:
        return (super().nbytes(k) or 0) + self.ps[k].nbytes


def adamw_hoards() -> Target:
    return Hoards(moments, right_adamw, "refopt.conform.broken:adamw_hoards")


def amsgrad_forgotten(p: Array, g: Array, s: dict[str, Array], *, t: int, lr: float, beta1: float, beta2: float,
                      eps: float, wd: float, amsgrad: bool = False) -> Any:  # fmt: skip
    h = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps}
    return adam_step(p, g + f32(wd) * p, s, t, h)


def adam_ignores_amsgrad() -> Target:
    return FunctionalTarget(lambda p: moments(p), amsgrad_forgotten, "refopt.conform.broken:adam_ignores_amsgrad")


def decoupled(p: Array, g: Array, s: dict[str, Array], *, t: int, lr: float, beta1: float, beta2: float, eps: float,
              wd: float) -> Any:  # fmt: skip
    return adam_step(p * f32(1 - lr * wd), g, s, t, {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps})


def adam_decouples_its_decay() -> Target:
    return FunctionalTarget(moments, decoupled, "refopt.conform.broken:adam_decouples_its_decay")


def lion(change: Callable[..., Any], name: str) -> Callable[[], Target]:
    def update(p: Array, g: Array, s: dict[str, Array], *, t: int, lr: float, beta1: float, beta2: float,
               wd: float) -> Any:  # fmt: skip
        return change(p, g, s["m"], lr, f32(beta1), f32(1 - beta1), f32(beta2), f32(1 - beta2), wd)

    return lambda: FunctionalTarget(momentum_of, update, f"refopt.conform.broken:{name}")


def one_beta(p: Array, g: Array, m: Array, lr: float, b1: Any, o1: Any, b2: Any, o2: Any, wd: float) -> Any:
    m = b1 * m + o1 * g
    return p * f32(1 - lr * wd) - f32(lr) * sign(m), {"m": m}


def too_soon(p: Array, g: Array, m: Array, lr: float, b1: Any, o1: Any, b2: Any, o2: Any, wd: float) -> Any:
    m = b2 * m + o2 * g
    return p * f32(1 - lr * wd) - f32(lr) * sign(b1 * m + o1 * g), {"m": m}


def coupled(p: Array, g: Array, m: Array, lr: float, b1: Any, o1: Any, b2: Any, o2: Any, wd: float) -> Any:
    g = g + f32(wd) * p
    return p - f32(lr) * sign(b1 * m + o1 * g), {"m": b2 * m + o2 * g}


lion_is_signum = lion(one_beta, "lion_is_signum")
lion_moves_its_momentum_first = lion(too_soon, "lion_moves_its_momentum_first")
lion_couples_its_decay = lion(coupled, "lion_couples_its_decay")


def sgd(change: Callable[..., Any], name: str) -> Callable[[], Target]:
    def update(p: Array, g: Array, s: dict[str, Array], *, t: int, lr: float, wd: float, momentum: float = 0.0,
               dampening: float = 0.0, nesterov: bool = False) -> Any:  # fmt: skip
        g = g + f32(wd) * p
        return change(p, g, s.get("buf"), t, f32(lr), f32(momentum), f32(1 - dampening), nesterov)

    def init(p: Array, momentum: float = 0.0) -> dict[str, Array]:
        return {"buf": np.zeros(p.shape, f32)} if momentum else {}

    return lambda: FunctionalTarget(init, update, f"refopt.conform.broken:{name}")


def damped_at_once(p: Array, g: Array, b: Any, t: int, lr: Any, mu: Any, damp: Any, nesterov: bool) -> Any:
    if b is None:
        return p - lr * g, {}
    b = mu * b + damp * g
    return p - lr * (g + mu * b if nesterov else b), {"buf": b}


def never_nesterov(p: Array, g: Array, b: Any, t: int, lr: Any, mu: Any, damp: Any, nesterov: bool) -> Any:
    if b is None:
        return p - lr * g, {}
    b = g.copy() if t == 1 else mu * b + damp * g
    return p - lr * b, {"buf": b}


sgd_damps_its_first_step = sgd(damped_at_once, "sgd_damps_its_first_step")
sgd_ignores_nesterov = sgd(never_nesterov, "sgd_ignores_nesterov")


def eps_under_the_root(p: Array, g: Array, s: dict[str, Array], *, t: int, lr: float, alpha: float, eps: float,
                       wd: float) -> Any:  # fmt: skip
    g = g + f32(wd) * p
    v = f32(alpha) * s["v"] + f32(1 - alpha) * (g * g)
    return p - f32(lr) * (g / np.sqrt(v + f32(eps))), {"v": v}


def rmsprop_has_eps_inside() -> Target:
    name = "refopt.conform.broken:rmsprop_has_eps_inside"
    return FunctionalTarget(lambda p: {"v": np.zeros(p.shape, f32)}, eps_under_the_root, name)


class EightBits(Target):
    """Lion with its momentum in 255 even steps, a scale for each 256 elements; `wrong` is how it stores them."""

    TABLE = (np.arange(256) - 127).clip(-127, 127).astype(f32) / f32(127)

    def __init__(self, wrong: str, name: str) -> None:
        self.wrong, self.name = wrong, f"refopt.conform.broken:{name}"

    def start(self, rule: Rule, params: Sequence[Array], hyper: Hyper, dtype: str = "float32") -> None:
        self.h, self.ps = hyper, [p.copy() for p in params]
        self.boxes = [self.encode(np.zeros(p.size, f32)) for p in params]

    def encode(self, x: Array) -> Coded:
        starts = np.arange(0, x.size, 256)
        scales = np.maximum.reduceat(np.abs(x), starts)
        used = np.roll(scales, 1) if self.wrong == "neighbour" else scales
        y = x / np.maximum(np.repeat(scales, 256)[: x.size], f32(1e-38)) * f32(127)
        codes = (np.trunc(y) if self.wrong == "truncates" else np.rint(y)).astype(int) + 127
        return Coded(codes.clip(0, 254).astype(np.uint8), used.astype(f32), self.TABLE, 256)

    def step(self, grads: Sequence[Array]) -> None:
        h = self.h
        for k, g in enumerate(grads):
            m = decoded(self.boxes[k]).reshape(g.shape)
            c = f32(h["beta1"]) * m + f32(1 - h["beta1"]) * g
            self.ps[k] = self.ps[k] * f32(1 - h["lr"] * h["wd"]) - f32(h["lr"]) * sign(c)
            self.boxes[k] = self.encode((f32(h["beta2"]) * m + f32(1 - h["beta2"]) * g).reshape(-1))

    def params(self) -> list[Array]:
        return [p.copy() for p in self.ps]

    def state(self, k: int) -> dict[str, Array]:
        return {"m": decoded(self.boxes[k]).reshape(self.ps[k].shape)}

    def coded(self, k: int) -> dict[str, Coded]:
        return {"m": self.boxes[k]}


def lion_truncates_its_codes() -> Target:
    return EightBits("truncates", "lion_truncates_its_codes")


def lion_scales_by_its_neighbour() -> Target:
    return EightBits("neighbour", "lion_scales_by_its_neighbour")


BROKEN: dict[str, tuple[str, str]] = {
    "adamw_couples_its_decay": ("adamw", "L1/base/decay-coupled"),
    "adamw_decays_after": ("adamw", "L1/base/decay-order-after"),
    "adamw_swaps_its_betas": ("adamw", "L1/base/betas-swapped"),
    "adamw_has_eps_inside": ("adamw", "L1/base/eps-inside"),
    "adamw_adds_eps_too_early": ("adamw", "L1/base/eps-uncorrected"),
    "adamw_corrects_no_bias": ("adamw", "L1/base/no-bias-correction"),
    "adamw_counts_from_two": ("adamw", "L1/base/t-ahead"),
    "adamw_never_counts": ("adamw", "L1/base/t-stuck"),
    "adamw_decays_without_lr": ("adamw", "L1/base/decay-without-lr"),
    "adamw_keeps_bf16": ("adamw", "L1/base/state-bf16"),
    "adamw_subtracts_in_float32": ("adamw", "L1/base/one-minus-beta-f32"),
    "adamw_skips_the_tail": ("adamw", "L1/base/tail-untouched"),
    "adamw_swallows_nan": ("adamw", "L6/base/special-nan"),
    "adamw_spoils_the_gradient": ("adamw", "L0/base/gradient-changed"),
    "adamw_forgets_t": ("adamw", "L5/base/t-lost"),
    "adamw_forgets_v": ("adamw", "L5/base/state-changed"),
    "adamw_hoards": ("adamw", "L7/base/more-state"),
    "adam_ignores_amsgrad": ("adam", "L1/amsgrad/amsgrad-ignored"),
    "adam_decouples_its_decay": ("adam", "L1/base/decay-decoupled"),
    "lion_is_signum": ("lion", "L1/base/signum-beta1"),
    "lion_moves_its_momentum_first": ("lion", "L1/base/momentum-first"),
    "lion_couples_its_decay": ("lion", "L1/base/decay-coupled"),
    "lion_truncates_its_codes": ("lion", "L3/base/codes-truncated"),
    "lion_scales_by_its_neighbour": ("lion", "L3/base/scale-of-neighbour"),
    "sgd_damps_its_first_step": ("sgd", "L1/dampening/first-step-damped"),
    "sgd_ignores_nesterov": ("sgd", "L1/nesterov/nesterov-ignored"),
    "rmsprop_has_eps_inside": ("rmsprop", "L1/base/eps-inside"),
}
"""Every broken optimizer: the rule that it claims, and the first finding against it."""


def right() -> Target:
    """AdamW that is right."""
    return FunctionalTarget(moments, right_adamw, "refopt.conform.broken:right")
