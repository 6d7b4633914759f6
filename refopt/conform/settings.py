"""Hyper-parameters, weights and gradients that tell rules and dialects apart.

No value lies where two of them coincide: decay is on, betas differ, are no defaults and lose digits where 1 - beta is
taken in float32, eps is as large as some gradients, weights are as small as some steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refopt import rules
from refopt.assign import lookup
from refopt.spec import Array, Rule

f32 = np.float32

HEAVY = {"lr": 0.03, "momentum": 0.85, "wd": 0.07}
ADAM = {"lr": 0.013, "beta1": 0.8, "beta2": 0.9973, "eps": 1e-7}
SIGNS = {"lr": 0.003, "beta1": 0.85, "beta2": 0.993, "wd": 0.2}
SQUARES = {"lr": 0.013, "alpha": 0.9973, "eps": 1e-7, "wd": 0.06}
MIX = ADAM | {"beta3": 0.9991, "alpha": 3.5, "wd": 0.11}
SHORT = ADAM | {"wd": 0.2, "rank": 4, "gap": 3, "eps": 0.3}


class Setting(NamedTuple):
    """A rule with hyper-parameters: `hyper` is passed to the target and to the reference, `claims` to the reference
    alone: the dialect that the target is said to speak."""

    label: str
    hyper: dict[str, Any]
    claims: dict[str, Any] = {}  # noqa: RUF012  (nobody writes into it)

    @property
    def all(self) -> dict[str, Any]:
        return self.hyper | self.claims

    def without(self, name: str) -> Setting:
        """The same with a hyper-parameter switched off, for a target that has no word for it."""
        return self._replace(label=f"{self.label}-without-{name}", hyper=self.hyper | {name: 0.0})


SETTINGS: dict[str, list[Setting]] = {
    "sgd": [
        Setting("momentum", HEAVY),
        Setting("plain", {"lr": 0.03, "wd": 0.07}),
        Setting("dampening", HEAVY | {"dampening": 0.2}),
        Setting("nesterov", HEAVY | {"nesterov": True}),
    ],
    "adam": [Setting("base", ADAM | {"wd": 0.06}), Setting("amsgrad", ADAM | {"wd": 0.06, "amsgrad": True})],
    "adamw": [Setting("base", ADAM | {"wd": 0.11}), Setting("amsgrad", ADAM | {"wd": 0.11, "amsgrad": True})],
    "lion": [Setting("base", SIGNS)],
    "signum": [Setting("base", {"lr": 0.003, "beta": 0.85, "wd": 0.2})],
    "rmsprop": [
        Setting("base", SQUARES),
        Setting("momentum", SQUARES | {"momentum": 0.85}),
        Setting("centered", SQUARES | {"centered": True}),
    ],
    "adagrad": [
        Setting("base", {"lr": 0.013, "wd": 0.06, "eps": 1e-7}),
        Setting("decayed", {"lr": 0.013, "lr_decay": 0.03, "wd": 0.06, "eps": 1e-7}),
        Setting("started", {"lr": 0.013, "init_acc": 0.003, "wd": 0.06, "eps": 1e-7}),
    ],
    "ademamix": [Setting("base", MIX), Setting("ramped", MIX | {"t_alpha": 4, "t_beta3": 5})],
    "adafactor": [
        Setting("base", {"wd": 0.3, "eps1": 1e-12, "eps2": 0.03, "clip": 1.1, "decay_rate": -0.6}),
        Setting("fixed", {"lr": 0.02, "relative_step": False, "beta1": 0.8, "wd": 0.2}),
    ],
    "came": [
        Setting("base", {"lr": 0.003, "beta1": 0.8, "beta2": 0.97, "beta3": 0.99, "clip": 0.8, "wd": 0.2}),
    ],
    "adam_mini": [Setting("rows", ADAM | {"wd": 0.11, "eps": 0.03})],
    "sm3": [Setting("base", {"lr": 0.03, "momentum": 0.8})],
    "lamb": [Setting("base", ADAM | {"wd": 0.06}), Setting("cut", ADAM | {"wd": 0.06, "max_unorm": 0.1})],
    "lars": [
        Setting("base", {"lr": 0.7, "trust": 0.02, "momentum": 0.85, "wd": 0.07}),
        Setting("cut", {"lr": 0.05, "momentum": 0.85, "wd": 0.07, "max_unorm": 0.03}),
    ],
    "schedule_free": [Setting("base", ADAM | {"wd": 0.06})],
    "muon": [Setting("base", {"lr": 0.003, "momentum": 0.8, "wd": 0.2})],
    "galore": [Setting("base", SHORT | {"scale": 0.7})],
    "apollo": [Setting("base", SHORT | {"scale": 1.7})],
}

SHAPES = ((64, 96), (33, 129), (31,), (16, 16))
"""One of whole blocks, one whose last block is short, both large enough to be stored in 8 bits; a vector; a square."""


def claimed(text: str) -> tuple[Rule, dict[str, Any]]:
    """`adam` or `adam(decay=decoupled, eps_at=inside)`: the record and the dialect that is claimed.

    Raises ValueError or TypeError, naming what is wrong.
    """
    stem, _, rest = text.partition("(")
    rule: Rule = lookup("rule", rules.RULES, stem.strip())
    claims: dict[str, Any] = {}
    for part in filter(None, (s.strip() for s in rest.rstrip(") ").split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: a dialect is written as name=value, got {part!r}")
        claims[name.strip()] = valued(value.strip())
    for setting in settings(rule, claims):
        rule.check(f"--as {text}", setting.all)
    return rule, claims


def valued(text: str) -> Any:
    """A number, True, False or None where the text is one; else the text."""
    for make in (int, float):
        try:
            return make(text)
        except ValueError:
            pass
    return {"True": True, "true": True, "False": False, "false": False, "None": None}.get(text, text)


def settings(rule: Rule, claims: dict[str, Any] | None = None) -> list[Setting]:
    """Every setting of a rule, under the claims; those that a claim forbids are left out unless it is the first."""
    out = []
    for k, s in enumerate(SETTINGS.get(rule.stem) or [Setting("base", {})]):
        chosen = s._replace(claims=claims or {})
        try:
            rule.check("setting", chosen.all)
        except ValueError:
            if k == 0:
                raise
            continue
        out.append(chosen)
    return out


def shapes(rule: Rule, hyper: dict[str, Any]) -> list[tuple[int, ...]]:
    """The shapes that a rule can step."""
    out: list[tuple[int, ...]] = []
    for shape in SHAPES:
        try:
            if rule.fits is not None:
                rule.fits("conform", shape, rule.check("conform", hyper))
            out.append(shape)
        except ValueError:
            continue
    return out


class Data(NamedTuple):
    """Weights to start from, and each element's size of gradient."""

    params: list[Array]
    sizes: list[Array]

    def grads(self, t: int) -> list[Array]:
        """Gradients of step t: every size from 1e-9 to 30, signs by chance, one in fifty zero."""
        rng = np.random.default_rng([7, t])
        out = []
        for size in self.sizes:
            g = size * 10 ** rng.uniform(-0.5, 0.5, size.shape) * rng.choice([-1.0, 1.0], size.shape)
            out.append(np.where(rng.random(size.shape) < 0.02, 0.0, g).astype(f32))
        return out


def data(some: list[tuple[int, ...]], seed: int = 5) -> Data:
    """Weights from 1e-3 to 3 and sizes of gradients from 1e-9 to 30, both log-uniform."""
    rng = np.random.default_rng(seed)
    params = [(rng.choice([-1.0, 1.0], s) * 10 ** rng.uniform(-3, 0.5, s)).astype(f32) for s in some]
    return Data(params, [10 ** rng.uniform(-9, 1.5, s) for s in some])


def plant(rule: Rule, hyper: dict[str, Any], g: Array, state: dict[str, Array], t: int) -> Array:
    """For rules of signs: a few gradients, others each step, that cancel the momentum to its last bits: rounding
    decides their step."""
    if rule.stem not in ("lion", "signum") or "m" not in state or g.size < 1024 or t < 3:
        return g
    beta = float(hyper["beta1"] if rule.stem == "lion" else hyper["beta"])
    flat, at = g.reshape(-1).copy(), slice(11 + t % 6, 59, 6)
    flat[at] = f32(-beta / (1 - beta)) * state["m"].reshape(-1)[at]
    return flat.reshape(g.shape)
