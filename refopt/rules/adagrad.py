r"""Adagrad (Duchi, Hazan & Singer, JMLR 12, 2011, Figure 1 with diagonal matrices), in the dialect of torch.optim.

A weight whose gradient is rarely large learns little from one rate for all. Adagrad divides each step by the root of
the sum of all squares that the weight has seen, so that rare weights step far and busy ones ever less.

======  ================  ========================================  =========
symbol  name              meaning                                   default
======  ================  ========================================  =========
p       parameter         the weights
g       gradient          of the loss by p
s       sum of squares    of all g so far; it never shrinks
lr      learning rate     step length, >= 0                         1e-2
lr_dec  decay of lr       lr / (1 + (t - 1) lr_decay), >= 0         0
init    first value of s  >= 0                                      0
eps     guard             added to sqrt(s), >= 0                    1e-10
wd      weight decay      coupled (L2), >= 0                        0
======  ================  ========================================  =========

State: ``s``, float32, the parameter's shape; 4 bytes a parameter. From ``init_acc=0`` the first step is lr long
whatever g is, the t-th under a constant gradient lr / sqrt(t). In float32 s stops growing once g^2 is less than half
of its last digit: after some 2^24 equal steps.

``eps_at="inside"`` takes sqrt(s + eps), as Keras and optax do.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
>>> state = rules.adagrad.init(p, init_acc=0.1)
>>> p, state = rules.adagrad.update(p, g, state, t=1, lr=0.1, lr_decay=0.5, wd=0.1)
>>> p, state = rules.adagrad.update(p, -2 * g, state, t=2, lr=0.1, lr_decay=0.5, wd=0.1)
>>> print(p.round(5), state["s"].round(5))
[ 0.96496 -1.95497] [1.286   0.59469]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt.scalars import f32
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, init_acc: float = 0.0, **hyper: Any) -> dict[str, Array]:
    """The sum of squares, at its first value."""
    return {"s": np.full(p.shape, init_acc, f32)}


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    init_acc: float = 0.0,
    eps: float = 1e-10,
    wd: float = 0.0,
    eps_at: str = "outside",
) -> tuple[Array, dict[str, Array]]:
    """One step; the rate that decays with t is one host scalar."""
    clr = f32(lr / (1.0 + (t - 1) * lr_decay))
    eps, wd = f32(eps), f32(wd)
    if wd:
        g = g + wd * p
    s = state["s"] + g * g
    d = np.sqrt(s + eps) if eps_at == "inside" else np.sqrt(s) + eps
    r = f32(1) / d
    p = p - clr * (g * r)
    return p, {"s": s}


rule = Rule(
    stem="adagrad",
    title="Adagrad",
    source="Duchi, Hazan & Singer, JMLR 12, 2011; torch.optim.Adagrad",
    states=(State("s", "sum of g^2", nonnegative=True, torch="sum"),),
    hypers=(
        Hyper("lr", "lr", 1e-2, "learning rate", low=0),
        Hyper("lr_decay", "lr_dec", 0.0, "how fast lr falls: lr / (1 + (t - 1) lr_decay)", low=0, torch="lr_decay"),
        Hyper("init_acc", "init", 0.0, "first value of s", low=0, torch="initial_accumulator_value"),
        Hyper("eps", "eps", 1e-10, "added to sqrt(s)", low=0, torch="eps"),
        Hyper("wd", "wd", 0.0, "weight decay, coupled: g + wd p", low=0, torch="weight_decay"),
        Hyper(
            "eps_at",
            "eps",
            "outside",
            "outside: sqrt(s) + eps (torch, bitsandbytes); inside: sqrt(s + eps) (Keras, optax)",
            choices=("outside", "inside"),
        ),
    ),
    init=init,
    update=update,
)
