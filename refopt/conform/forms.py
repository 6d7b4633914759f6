"""Other ways to write the same running mean, each with its own roundings: torch's lerp, a fused multiply-add.

They are not deviations; naming the one that gives the most equal bits says where the last digit comes from.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refopt.conform.record import Run
from refopt.spec import Array, Rule

f32, f64 = np.float32, np.float64

MEANS: dict[str, dict[str, tuple[str, bool]]] = {
    "adam": {"m": ("beta1", False), "v": ("beta2", True)},
    "adamw": {"m": ("beta1", False), "v": ("beta2", True)},
    "lion": {"m": ("beta2", False)},
    "signum": {"m": ("beta", False)},
    "rmsprop": {"v": ("alpha", True), "a": ("alpha", False)},
    "ademamix": {"m1": ("beta1", False), "m2": ("beta3", False), "v": ("beta2", True)},
    "lamb": {"m": ("beta1", False), "v": ("beta2", True)},
    "adam_mini": {"m": ("beta1", False)},
    "muon": {"B": ("momentum", False)},
}
"""The states that are running means: their beta, and whether they are of squares."""


def fma(a: Any, b: Any, c: Any) -> Array:
    """a b + c, rounded once (but for double rounding, which is rare)."""
    return (f64(a) * np.asarray(b, f64) + np.asarray(c, f64)).astype(f32)


def forms(b: float, m: Array, g: Array, squares: bool) -> dict[str, Array]:
    """Every way, by name."""
    beta, omb = f32(b), f32(1.0 - b)
    x = g * g if squares else g
    out = {
        "as-written": beta * m + omb * x,
        "lerp": m + omb * (x - m),
        "lerp-fma": fma(omb, x - m, m),
        "add-fma": fma(omb, x, beta * m),
        "mul-fma": fma(beta, m, omb * x),
    }
    if squares:
        out |= {"addcmul": beta * m + (omb * g) * g, "addcmul-fma": fma(omb * g, g, beta * m)}
    return out


SAYS = {
    "lerp": "{s} + (1 - {b})({x} - {s}), torch's lerp",
    "lerp-fma": "{s} + (1 - {b})({x} - {s}), torch's lerp with a fused multiply-add",
    "add-fma": "{b} {s}, then (1 - {b}) {x} added by a fused multiply-add",
    "mul-fma": "(1 - {b}) {x}, then {b} {s} added by a fused multiply-add",
    "addcmul": "{b} {s} + ((1 - {b}) g) g, torch's addcmul",
    "addcmul-fma": "{b} {s} + ((1 - {b}) g) g, torch's addcmul with a fused multiply-add",
}


class Form(NamedTuple):
    """How a state is written, with the share of equal bits under that form and under the reference's."""

    state: str
    id: str
    says: str
    equal: float
    as_written: float

    def __str__(self) -> str:
        return f"{self.state} is {self.says}: {self.equal:.2%} of bits equal, {self.as_written:.2%} as written here"


def named(run: Run, rule: Rule, hyper: dict[str, Any]) -> list[Form]:
    """The form of each running mean that has more equal bits than the reference's."""
    out = []
    for state, (beta, squares) in MEANS.get(rule.stem, {}).items():
        found = best(run, rule, hyper, state, beta, squares)
        if found:
            out.append(found)
    return out


def best(run: Run, rule: Rule, hyper: dict[str, Any], state: str, beta: str, squares: bool) -> Form | None:
    counts: dict[str, list[float]] = {}
    for taken in run.steps:
        if taken.before is None or state not in taken.before or state not in taken.after:
            return None
        with np.errstate(all="ignore"):
            g = taken.g + f32(hyper["wd"]) * taken.p if coupled(rule, hyper) else taken.g
            for name, x in forms(hyper[beta], taken.before[state], g, squares).items():
                counts.setdefault(name, []).append(float((x == taken.after[state].reshape(x.shape)).mean()))
    if not counts:
        return None
    shares = {n: float(np.mean(x)) for n, x in counts.items()}
    top = max(shares, key=lambda n: shares[n])
    if shares[top] <= shares["as-written"] + 1e-3:
        return None
    words = {"s": state, "b": beta, "x": "g^2" if squares else "g"}
    return Form(state, top, SAYS[top].format(**words), shares[top], shares["as-written"])


def coupled(rule: Rule, hyper: dict[str, Any]) -> bool:
    """Whether decay goes through the gradient into the means."""
    return bool(hyper.get("wd")) and (hyper.get("decay") == "coupled" or rule.stem == "rmsprop")
