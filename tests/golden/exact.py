"""The rules and codecs once more, one element at a time, in exact fractions: a path that shares nothing with NumPy.

Every operation is computed exactly and rounded to float32 by `nearest`; square roots come from integer roots. Host
scalars are exact too (beta^t as a fraction), rounded once, which is what float64 gives but for one case in 2^29.
Zero has no sign here, NaN and Inf do not exist: the laws of special values stand elsewhere.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import isqrt
from typing import Any


def nearest(x: Fraction, digits: int = 24, emin: int = -126) -> Fraction:
    """`x` rounded to `digits` binary digits, ties to even, gradual underflow below 2^emin."""
    if x == 0:
        return x
    size = abs(x)
    e = size.numerator.bit_length() - size.denominator.bit_length()
    e -= size < Fraction(2) ** e
    ulp = Fraction(2) ** (max(e, emin) - digits + 1)
    rounded = round(x / ulp) * ulp
    if abs(rounded) >= 2**128:
        raise OverflowError(f"{float(x)} is beyond float32")
    return rounded


class Single:
    """A float32 number; each operation is exact, then rounded once."""

    __slots__ = ("x",)

    def __init__(self, x: Any) -> None:
        self.x = nearest(Fraction(x))

    def __add__(self, other: Single) -> Single:
        return Single(self.x + other.x)

    def __sub__(self, other: Single) -> Single:
        return Single(self.x - other.x)

    def __mul__(self, other: Single) -> Single:
        return Single(self.x * other.x)

    def __truediv__(self, other: Single) -> Single:
        return Single(self.x / other.x)

    def sign(self) -> Single:
        return Single((self.x > 0) - (self.x < 0))

    def root(self) -> Single:
        """Correctly rounded: 2^-200 of the root decide no rounding but an exact one."""
        scaled = self.x * 4**200
        r = isqrt(scaled.numerator // scaled.denominator)
        exact = r * r == scaled
        return Single(Fraction(2 * r + (not exact), 2 ** (200 + 1)))


def word(x: Single) -> str:
    """The float32 word in hex."""
    return struct.pack(">f", float(x.x)).hex()


def single(hex_word: str) -> Single:
    return Single(struct.unpack(">f", bytes.fromhex(hex_word))[0])


State = dict[str, Single]
ONE = Single(1)


def sgd(
    p: Single,
    g: Single,
    s: State,
    t: int,
    lr: float,
    momentum: float = 0,
    dampening: float = 0,
    nesterov: bool = False,
    wd: float = 0,
    lr_at: str = "outside",
    decay: str = "coupled",
) -> tuple[Single, State]:
    if decay == "decoupled":
        p = p * Single(1 - Fraction(lr) * Fraction(wd))
    elif wd:
        g = g + Single(wd) * p
    if lr_at == "inside":
        g, lr = Single(lr) * g, 1
    if not momentum:
        return p - Single(lr) * g, {}
    mu = Single(momentum)
    buf = g if t == 1 else mu * s["buf"] + Single(1 - Fraction(dampening)) * g
    return p - Single(lr) * (g + mu * buf if nesterov else buf), {"buf": buf}


def _adam(
    p: Single,
    g: Single,
    s: State,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    amsgrad: bool = False,
    bias_correction: bool = True,
    eps_at: str = "outside",
    additive: float = 0,
) -> tuple[Single, State]:
    b1, b2 = Fraction(beta1), Fraction(beta2)
    bc1, bc2 = (1 - b1**t, 1 - b2**t) if bias_correction else (Fraction(1), Fraction(1))
    m = Single(b1) * s["m"] + Single(1 - b1) * g
    v = Single(b2) * s["v"] + Single(1 - b2) * (g * g)
    w = Single(max(s["w"].x, v.x)) if amsgrad else v
    ir2, guard = Single(1) / _wide_root(bc2), Single(eps)
    if eps_at == "inside":
        d = (w + guard).root() * ir2
    else:
        d = (w.root() + guard) * ir2 if eps_at == "uncorrected" else w.root() * ir2 + guard
    r = ONE / d
    new = {"m": m, "v": v} | ({"w": w} if amsgrad else {})
    if additive:
        return p - Single(lr) * (m * Single(1 / bc1) * r + Single(additive) * p), new
    return p - Single(Fraction(lr) / bc1) * (m * r), new


class _wide_root(Single):
    """A root that is not rounded to float32, so that 1 / sqrt(bc2) is rounded once."""

    def __init__(self, x: Fraction) -> None:
        scaled = x * 4**200
        self.x = Fraction(isqrt(scaled.numerator // scaled.denominator), 2**200)


def adam(
    p: Single,
    g: Single,
    s: State,
    t: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0,
    decay: str = "coupled",
    **dialect: Any,
) -> tuple[Single, State]:
    if decay == "decoupled":
        return adamw(p, g, s, t, lr, beta1, beta2, eps, wd, **dialect)
    return _adam(p, g + Single(wd) * p if wd else g, s, t, lr, beta1, beta2, eps, **dialect)


def adamw(
    p: Single,
    g: Single,
    s: State,
    t: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.01,
    decay_order: str = "before",
    **dialect: Any,
) -> tuple[Single, State]:
    decay = Single(1 - Fraction(lr) * Fraction(wd))
    if decay_order == "additive":
        return _adam(p, g, s, t, lr, beta1, beta2, eps, additive=wd, **dialect)
    p, new = _adam(p * decay if decay_order == "before" else p, g, s, t, lr, beta1, beta2, eps, **dialect)
    return p * decay if decay_order == "after" else p, new


def lion(
    p: Single,
    g: Single,
    s: State,
    t: int,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.99,
    wd: float = 0,
    decay_order: str = "before",
) -> tuple[Single, State]:
    b1, b2, decay = Fraction(beta1), Fraction(beta2), Single(1 - Fraction(lr) * Fraction(wd))
    p = p * decay if decay_order == "before" else p
    c = Single(b1) * s["m"] + Single(1 - b1) * g
    u = c.sign() + Single(wd) * p if decay_order == "additive" else c.sign()
    p = p - Single(lr) * u
    p = p * decay if decay_order == "after" else p
    return p, {"m": Single(b2) * s["m"] + Single(1 - b2) * g}


def rmsprop(
    p: Single,
    g: Single,
    s: State,
    t: int,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    wd: float = 0,
    momentum: float = 0,
    centered: bool = False,
    eps_at: str = "outside",
) -> tuple[Single, State]:
    g = g + Single(wd) * p if wd else g
    oma = Single(1 - Fraction(alpha))
    v = Single(alpha) * s["v"] + oma * (g * g)
    z, new = v, {"v": v}
    if centered:
        new["a"] = a = Single(alpha) * s["a"] + oma * g
        z = Single(max((v - a * a).x, 0))
    d = (z + Single(eps)).root() if eps_at == "inside" else z.root() + Single(eps)
    u = g * (ONE / d)
    if momentum:
        new["buf"] = u = Single(momentum) * s["buf"] + u
    return p - Single(lr) * u, new


def adagrad(
    p: Single,
    g: Single,
    s: State,
    t: int,
    lr: float = 0.01,
    lr_decay: float = 0,
    init_acc: float = 0,
    eps: float = 1e-10,
    wd: float = 0,
    eps_at: str = "outside",
) -> tuple[Single, State]:
    g = g + Single(wd) * p if wd else g
    total = s["s"] + g * g
    d = (total + Single(eps)).root() if eps_at == "inside" else total.root() + Single(eps)
    rate = Single(Fraction(lr) / (1 + (t - 1) * Fraction(lr_decay)))
    return p - rate * (g * (ONE / d)), {"s": total}


def signum(
    p: Single,
    g: Single,
    s: State,
    t: int,
    lr: float = 1e-4,
    beta: float = 0.9,
    wd: float = 0,
    decay_order: str = "before",
) -> tuple[Single, State]:
    m = Single(beta) * s["m"] + Single(1 - Fraction(beta)) * g if beta else g
    decay = Single(1 - Fraction(lr) * Fraction(wd))
    p = p * decay if decay_order == "before" else p
    u = m.sign() + Single(wd) * p if decay_order == "additive" else m.sign()
    p = p - Single(lr) * u
    p = p * decay if decay_order == "after" else p
    return p, {"m": m} if beta else {}


def ademamix(
    p: Single,
    g: Single,
    s: State,
    t: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta3: float = 0.9999,
    alpha: float = 2,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
    eps: float = 1e-8,
    wd: float = 0,
    decay_order: str = "before",
) -> tuple[Single, State]:
    b1, b2, b3, a = Fraction(beta1), Fraction(beta2), Fraction(beta3), Fraction(alpha)
    if t_alpha and t < t_alpha:
        a = a * t / t_alpha
    if t_beta3 and t < t_beta3:
        x, y = Decimal(beta1).ln(), Decimal(beta3).ln()
        b3 = Fraction((1 / ((1 - Decimal(t) / t_beta3) / x + Decimal(t) / t_beta3 / y)).exp())
    decay = Single(1 - Fraction(lr) * Fraction(wd))
    p = p * decay if decay_order == "before" else p
    m1 = Single(b1) * s["m1"] + Single(1 - b1) * g if beta1 else g
    m2 = Single(b3) * s["m2"] + Single(1 - b3) * g
    v = Single(b2) * s["v"] + Single(1 - b2) * (g * g)
    num = m1 + Single(a * (1 - b1**t)) * m2
    r = ONE / (v.root() * (Single(1) / _wide_root(1 - b2**t)) + Single(eps))
    if decay_order == "additive":
        p = p - Single(lr) * (num * Single(1 / (1 - b1**t)) * r + Single(wd) * p)
    else:
        p = p - Single(Fraction(lr) / (1 - b1**t)) * (num * r)
    p = p * decay if decay_order == "after" else p
    return p, ({"m1": m1} if beta1 else {}) | {"m2": m2, "v": v}


RULES: dict[str, Callable[..., tuple[Single, State]]] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "lion": lion,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "signum": signum,
    "ademamix": ademamix,
}


def kept(rule: str, hyper: dict[str, Any]) -> tuple[str, ...]:
    """The states of a run."""
    buf = ("buf",) if hyper.get("momentum") else ()
    if rule == "rmsprop":
        return ("v", *(["a"] if hyper.get("centered") else []), *buf)
    if rule == "adagrad":
        return ("s",)
    if rule == "signum":
        return ("m",) if hyper.get("beta", 1) else ()
    if rule == "ademamix":
        return (*(["m1"] if hyper.get("beta1", 1) else []), "m2", "v")
    adam = ("m", "v", *(["w"] if hyper.get("amsgrad") else []))
    return {"sgd": buf, "adam": adam, "adamw": adam, "lion": ("m",)}[rule]


def cells(signed: bool) -> list[Fraction]:
    """The 256 exact values of the dynamic map: 7 decades of equal cells' centres, with 0 and 1."""
    positive = [
        (Fraction(1, 10) + Fraction(9 * (2 * j + 1), 20 * k)) / 10 ** (6 - i)
        for i in range(7)
        for k in [2**i if signed else 2 ** (i + 1)]
        for j in range(k)
    ]
    return sorted(positive + [-c for c in positive if signed] + [Fraction(0), Fraction(1)])


def _normalised(xs: list[Single]) -> tuple[Single, list[Single]]:
    """(absmax, x * fl32(1 / absmax)); a block below 2^-100 is zero."""
    a = Single(max(abs(x.x) for x in xs))
    if a.x < Fraction(1, 2**100):
        return Single(0), [Single(0)] * len(xs)
    inv = ONE / a
    return a, [x * inv for x in xs]


@cache
def _midpoints(signed: bool) -> list[Fraction]:
    c = [Single(v) for v in cells(signed) if v >= 0]
    return [((a + b) * Single(Fraction(1, 2))).x for a, b in pairwise(c)]


def _dynamic8(y: Single, signed: bool) -> int:
    zero = 127 if signed else 0
    steps = sum(abs(y.x) > m for m in _midpoints(signed))
    return zero + steps if y.x >= 0 else max(zero - steps, 0)


def dynamic8(xs: list[Single], signed: bool) -> tuple[list[int], Single, list[Single]]:
    """(codes, scale, decoded) of one block."""
    a, ys = _normalised(xs)
    codes, table = [_dynamic8(y, signed) for y in ys], cells(signed)
    return codes, a, [Single(table[q]) * a for q in codes]


def int8_linear(xs: list[Single], signed: bool) -> tuple[list[int], Single, list[Single]]:
    """(codes, scale, decoded) of one block."""
    levels = Single(127 if signed else 255)
    a, ys = _normalised(xs)
    codes, scale = [round((y * levels).x) for y in ys], a / levels
    return codes, scale, [Single(q) * scale for q in codes]


def bf16(xs: list[Single], signed: bool) -> tuple[list[int], None, list[Single]]:
    """(codes, None, decoded)."""
    near = [Single(nearest(x.x, 8)) for x in xs]
    return [int(word(x)[:4], 16) for x in near], None, near


CODECS: dict[str, Callable[..., Any]] = {"bf16": bf16, "int8_linear": int8_linear, "dynamic8": dynamic8}


def run(
    rule: str, hyper: dict[str, Any], p: Iterable[float], grads: Iterable[Iterable[float]], codecs: dict[str, str]
) -> list[dict[str, Any]]:
    """Every step of one block of weights: words of p, of each fresh state, and what each coded state stores."""
    weights = [Single(x) for x in p]
    names = kept(rule, hyper)
    states = [{k: Single(hyper.get("init_acc", 0)) for k in names} for _ in weights]
    states, _ = _stored(states, names, codecs)
    out = []
    for t, g in enumerate(grads, 1):
        done = [RULES[rule](w, Single(x), s, t, **hyper) for w, x, s in zip(weights, g, states, strict=True)]
        weights, states = [w for w, _ in done], [s for _, s in done]
        row: dict[str, Any] = {"p": [word(w) for w in weights]} | {k: [word(s[k]) for s in states] for k in names}
        states, coded = _stored(states, names, codecs)
        out.append(row | coded)
    return out


def _stored(
    states: list[State], names: Iterable[str], codecs: dict[str, str]
) -> tuple[list[State], dict[str, dict[str, Any]]]:
    """What is read back of the states, and the codes of those that have a codec."""
    coded: dict[str, dict[str, Any]] = {}
    for k in names:
        if k in codecs:
            codes, scale, decoded = CODECS[codecs[k]]([s[k] for s in states], k not in ("v", "s", "w"))
            coded[k] = {"codes": codes} | ({"scales": word(scale)} if scale else {})
            states = [s | {k: x} for s, x in zip(states, decoded, strict=True)]
    return states, coded
