"""Changes to the step of a rule: what makes a dialect, or a mistake that has been made before, of the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from refopt import rules
from refopt.conform.measure import Step, bf16
from refopt.conform.record import oracle
from refopt.spec import Array, Rule

f32 = np.float32
Hyper = dict[str, Any]
Make = Callable[[Rule, Hyper], Step]
"""What makes the step of a rule with hyper-parameters."""
Around = Callable[[Make, Rule, Hyper], Step]
"""A change: the step of a rule, given what makes steps."""


def plain(rule: Rule, hyper: Hyper) -> Step:
    return oracle(rule, hyper)


class Narrow(float):
    """A beta whose 1 - beta is computed in float32, and no other use of it."""

    def __rsub__(self, other: Any) -> float:
        return float(f32(other) - f32(self))


class Power(float):
    """beta^t whose distance from 1 is taken in float32."""

    def __mul__(self, other: Any) -> Power:
        return Power(float(self) * float(other))

    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> float:
        return float(f32(other) - f32(float(self)))


class Corrected(float):
    """A beta in float32 whose powers are, and whose own 1 - beta is not."""

    def __mul__(self, other: Any) -> Power:
        return Power(float(f32(float(self))) * float(f32(float(other))))

    __rmul__ = __mul__


def corrections_in_f32(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {n: Corrected(hyper[n]) for n in ("beta1", "beta2")})


class Single(Corrected):
    """A beta in float32 in all that is taken from it: its own 1 - beta, its powers, and theirs."""

    def __rsub__(self, other: Any) -> float:
        return float(f32(other) - f32(float(self)))


def scalars_in_f32(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {n: Single(hyper[n]) for n in betas_of(hyper)})


LOGARITHM = 2.0**-21
"""How far a GPU's fast base-2 logarithm may be off near 1, where powers of beta begin."""


def by_fast_powers(hyper: Hyper, t: int) -> float:
    """The share of a step that corrections are off by where beta^t is exp2(t log2(beta)) in a GPU's fast arithmetic."""
    shares = []
    for n in ("beta1", "beta2"):
        power = hyper[n] ** t
        shares.append(power * (t * LOGARITHM + 2.0**-22) / (1.0 - power))
    return shares[0] + shares[1] / 2


def betas_of(hyper: Hyper) -> list[str]:
    return [n for n in ("beta1", "beta2", "beta3", "beta", "alpha", "momentum") if isinstance(hyper.get(n), float)]


def narrow(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {n: Narrow(hyper[n]) for n in betas_of(hyper)})


def swapped(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {"beta1": hyper["beta2"], "beta2": hyper["beta1"]})


def at(shift: Callable[[int], int]) -> Around:
    """The same step at another t."""

    def around(make: Make, rule: Rule, hyper: Hyper) -> Step:
        step = make(rule, hyper)
        return lambda p, g, state, t: step(p, g, state, max(shift(t), 1))

    return around


def by_gradient(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """Decay that goes through the gradient, whatever the rule says."""
    step, wd = make(rule, hyper | {"wd": 0.0}), f32(hyper["wd"])
    return lambda p, g, state, t: step(p, g + wd * p, state, t)


def decoupled(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """Decay that shrinks the old weights, whatever the rule says."""
    step, keep = make(rule, hyper | {"wd": 0.0}), f32(1.0 - hyper["lr"] * hyper["wd"])
    return lambda p, g, state, t: step(p * keep, g, state, t)


def unscaled(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {"wd": hyper["wd"] / hyper["lr"]})


def kept_in_bf16(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """States rounded to bfloat16 after every step."""
    step = make(rule, hyper)

    def rounded(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        p, new = step(p, g, state, t)
        return p, {n: bf16(x) if x.dtype == f32 else x for n, x in new.items()}

    return rounded


def debiased(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """m and v are kept corrected: beta becomes (beta - beta^t) / (1 - beta^t), and nothing is corrected later."""

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        hat = {n: (hyper[n] - hyper[n] ** t) / (1.0 - hyper[n] ** t) for n in ("beta1", "beta2")}
        return make(rule, hyper | hat | {"bias_correction": False})(p, g, state, t)

    return step


def sign_of_one(beta: str) -> Around:
    """Signum in Lion's place: one beta for both mixtures, the step along the sign of the new momentum."""

    def around(make: Make, rule: Rule, hyper: Hyper) -> Step:
        return make(rules.signum, {"lr": hyper["lr"], "beta": hyper[beta], "wd": hyper["wd"]})

    return around


def momentum_first(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """Lion whose momentum moves before the weights do, and enters their step."""
    step, b2, omb2 = make(rule, hyper), f32(hyper["beta2"]), f32(1.0 - hyper["beta2"])

    def early(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        m = b2 * state["m"] + omb2 * g
        return step(p, g, {"m": m}, t)[0], {"m": m}

    return early


def damped_first(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """SGD whose buffer starts at zero and takes its first gradient damped."""
    step = make(rule, hyper)
    return lambda p, g, state, t: step(p, g, state, max(t, 2))


def by_lr(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """Adafactor whose decay is lr wd, without the size of the weights."""

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        rho = hyper["lr"] if hyper.get("lr") is not None else min(1e-2, 1.0 / t**0.5)
        new, states = make(rule, hyper | {"wd": 0.0})(p, g, state, t)
        return (new - p) + p * f32(1.0 - rho * hyper["wd"]), states

    return step


def corrected_slow(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """AdEMAMix that divides the slow mean by 1 - beta3^t too."""

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        return make(rule, hyper | {"alpha": hyper["alpha"] / (1.0 - hyper["beta3"] ** t)})(p, g, state, t)

    return step


def cut_lamb(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """LAMB's clip variant as bitsandbytes has it on a CPU: another norm, and decay before the step."""
    keep = f32(1.0 - hyper["lr"] * hyper["wd"])

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        longer = (1.0 - hyper["beta1"] ** t) / (1.0 - hyper["beta2"] ** t) ** 0.5
        now = hyper | {"variant": "clip", "wd": 0.0, "max_unorm": hyper["max_unorm"] / longer}
        new, states = make(rule, now)(p, g, state, t)
        return p * keep + (new - p), states

    return step


def cut_lars(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """LARS as bitsandbytes has it on a CPU: momentum whose step is cut to max_unorm of the weights' norm."""
    mu, wd = f32(hyper["momentum"]), f32(hyper["wd"])

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        v = mu * state["v"] + (g + wd * p)
        size, most = float(np.linalg.norm(v.astype(np.float64))), float(np.linalg.norm(p.astype(np.float64)))
        q = min(1.0, hyper["max_unorm"] * most / size) if size else 1.0
        return p - f32(hyper["lr"] * q) * v, {"v": v}

    return step


def of_steps(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """A momentum buffer that holds what is added to the weights; that of LARS has lr in it as it is."""
    step, name = make(rule, hyper), "v" if rule.stem == "lars" else "buf"
    lr = f32(-1.0 if rule.stem == "lars" else -hyper["lr"])

    def added(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        p, new = step(p, g, state | {name: state[name] / lr}, t)
        return p, new | {name: new[name] * lr}

    return added


def damped_by_momentum(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {"dampening": hyper["momentum"]})


def backward(make: Make, rule: Rule, hyper: Hyper) -> Step:
    step = make(rule, hyper)
    return lambda p, g, state, t: step(p, -g, state, t)


def accumulated(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """RMSprop or Adagrad whose decay enters the squares and not the step."""
    step, state_of = make(rule, hyper), "v" if rule.stem == "rmsprop" else "s"

    def raw(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        states = step(p, g, state, t)[1]
        lr = f32(hyper["lr"] / (1.0 + (t - 1) * hyper.get("lr_decay", 0.0)))
        return p - lr * (g / (np.sqrt(states[state_of]) + f32(hyper["eps"]))), states

    return raw
