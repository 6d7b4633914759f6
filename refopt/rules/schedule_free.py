r"""Schedule-Free AdamW (Defazio et al., arXiv 2405.15682, Algorithm 1), in the dialect of schedulefree 1.4.

A learning rate schedule must know when training ends. Schedule-Free needs none: it steps one sequence, averages it
into another, takes gradients between the two, and the average is good whenever one stops.

======  ===============  ==================================================================  =======
symbol  name             meaning                                                             default
======  ===============  ==================================================================  =======
p = y   parameter        the weights that gradients are taken at: (1 - beta1) z + beta1 x
g       gradient         of the loss by y
z       base             the sequence that steps
x       average          of all z, never kept: ``averaged`` rebuilds it from y and z
v       second moment    running mean of g^2, never negative
lr_t    rate at t        lr, or lr t / warmup in the first steps
w       weight of t      t^r lr_max^power, lr_max the largest lr_t so far
c       share of new z   w over the sum of all w; 1 at t=1
lr      learning rate    >= 0                                                                2.5e-3
beta1   interpolation    share of x in y, [0, 1); 0 has no average                           0.9
beta2   decay of v       [0, 1)                                                              0.999
eps     guard            added to sqrt(v), >= 0                                              1e-8
wd      weight decay     wd y joins the step, >= 0                                           0
r       r                exponent of t in w                                                  0
power   lr_power         exponent of lr_max in w                                             2
warmup  warmup           steps in which lr_t grows, whole, >= 0                              0
======  ===============  ==================================================================  =======

State: ``z`` (the weights, at first) and ``v``, float32, the parameter's shape; and two float64 numbers a tensor,
``weight_sum`` and ``lr_max``: 8 bytes a parameter and 16. There is no first moment: beta1 mixes weights, not gradients.
The weights of a step are y; to judge or to keep a model take ``averaged(p, state, beta1)``, and go on from p.

At t=1 z moves by lr against the sign of g, the average takes it whole, and y is there, too. A beta2 near 1 forgets
slowly: after quiet steps a sudden gradient moves a weight of z by up to lr / sqrt(1 - beta2), 32 lr by default, with
no first moment to soften it; a small one makes every step of z a sign.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
>>> state, hyper = rules.schedule_free.init(p), {"lr": 0.1, "beta1": 0.8, "beta2": 0.9, "wd": 0.1, "warmup": 2}
>>> p, state = rules.schedule_free.update(p, g, state, t=1, **hyper)
>>> p, state = rules.schedule_free.update(p, -2 * g, state, t=2, **hyper)
>>> print(p.round(4), state["z"].round(4), state["v"].round(4), averaged(p, state, 0.8).round(4))
[ 1.0417 -1.9183] [ 1.0601 -1.8951] [0.1225 0.0306] [ 1.0371 -1.924 ]
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from refopt.scalars import f32, ipow
from refopt.spec import Array, Hyper, Rule, State

f64 = np.float64


def init(p: Array, **hyper: Any) -> dict[str, Array]:
    """The base where the weights are, a second moment of zeros, no weight and no rate so far."""
    return {"z": p.copy(), "v": np.zeros(p.shape, f32), "weight_sum": np.zeros((), f64), "lr_max": np.zeros((), f64)}


def averaged(p: Array, state: dict[str, Array], beta1: float = 0.9) -> Array:
    """x, the weights to judge and to keep, from y and z: x = y + (1 - 1 / beta1) (z - y)."""
    if not beta1 > 0:
        raise ValueError(f"schedule_free.averaged: beta1 must be > 0, got {beta1!r}: y holds nothing of the average")
    return p + f32(1.0 - 1.0 / beta1) * (state["z"] - p)


def live(x: Array, state: dict[str, Array], beta1: float = 0.9) -> Array:
    """y, the weights to step, from x and z: y = x + (1 - beta1) (z - x)."""
    return x + f32(1.0 - beta1) * (state["z"] - x)


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 2.5e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
    r: float = 0.0,
    lr_power: float = 2.0,
    warmup: int = 0,
) -> tuple[Array, dict[str, Array]]:
    """One step; y moves to the mixture of the new average and the new base without either average being kept."""
    lr_t = lr * min(1.0, t / warmup) if warmup else lr
    lr_max = np.maximum(state["lr_max"], f64(lr_t))
    w = f64(t) ** r * lr_max**lr_power
    weight_sum = state["weight_sum"] + w
    c = w / weight_sum if weight_sum > 0 else f64(0)
    along = f32(lr_t * (beta1 * (1.0 - c) - 1.0))
    omb2, ir2 = f32(1.0 - beta2), f32(1.0 / sqrt(1.0 - ipow(beta2, t)))
    c, lr_t, beta2, eps, wd = f32(c), f32(lr_t), f32(beta2), f32(eps), f32(wd)
    v = beta2 * state["v"] + omb2 * (g * g)
    d = np.sqrt(v) * ir2 + eps
    u = g * (f32(1) / d)
    u = u + wd * p
    p = p + c * (state["z"] - p)
    p = p + along * u
    z = state["z"] - lr_t * u
    return p, {"z": z, "v": v, "weight_sum": weight_sum, "lr_max": lr_max}


def number(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...]:
    """The shape of a state that is one number a tensor."""
    return ()


rule = Rule(
    stem="schedule_free",
    title="Schedule-Free AdamW",
    source="Defazio et al., arXiv 2405.15682, Algorithm 1",
    states=(
        State("z", "base: the sequence that steps", coded=False),
        State("v", "second moment", nonnegative=True),
        State("weight_sum", "sum of the weights w", nonnegative=True, shape=number, coded=False, dtype=f64),
        State("lr_max", "largest rate so far", nonnegative=True, shape=number, coded=False, dtype=f64),
    ),
    hypers=(
        Hyper("lr", "lr", 2.5e-3, "learning rate", low=0),
        Hyper("beta1", "beta1", 0.9, "share of the average in y", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.999, "decay of v", low=0, high=1, torch="betas[1]"),
        Hyper("eps", "eps", 1e-8, "added to sqrt(v)", low=0, torch="eps"),
        Hyper("wd", "wd", 0.0, "weight decay at y: wd y joins the step", low=0, torch="weight_decay"),
        Hyper("r", "r", 0.0, "exponent of t in the weight of a step"),
        Hyper("lr_power", "power", 2.0, "exponent of lr_max in the weight of a step"),
        Hyper("warmup", "warmup", 0, "steps in which the rate grows to lr", low=0, whole=True),
    ),
    init=init,
    update=update,
    scope="tensor",
    tier="T0",
)
