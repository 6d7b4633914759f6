r"""RMSprop (Tieleman & Hinton 2012, lecture 6e; centred form: Graves, arXiv 1308.0850, eq. 38-41), as in torch.optim.

Adagrad's sum of squares only grows, so its steps only shrink. RMSprop forgets: it divides each gradient by the root of
a running mean of its square, so that every weight moves at about the same speed for ever.

======  =============  ========================================  =========
symbol  name           meaning                                   default
======  =============  ========================================  =========
p       parameter      the weights
g       gradient       of the loss by p
v       mean square    running mean of g^2, never negative
a       mean           running mean of g, if ``centered``
z       divisor^2      v, or the variance v - a^2
b       buf            running sum of g / sqrt(z), if momentum
lr      learning rate  step length, >= 0                         1e-2
alpha   decay of v     [0, 1)                                    0.99
eps     guard          added to sqrt(z), >= 0                    1e-8
wd      weight decay   coupled (L2), >= 0                        0
mu      momentum       share of b kept, [0, 1)                   0
======  =============  ========================================  =========

State: ``v``, and ``a`` if centered, and ``buf`` if momentum > 0: float32, the parameter's shape, 4 bytes a parameter
each. They start at zero and nothing corrects for it: the first step is lr / sqrt(1 - alpha) long, ten times lr.

An alpha nearer 1 makes first steps longer still; a small one makes z the last gradient's square, and every step a
sign.

``eps_at="inside"`` takes sqrt(z + eps), as TensorFlow does: another guard, not another value of the same.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
>>> p, state = rules.rmsprop.update(p, g, rules.rmsprop.init(p), t=1, lr=0.01, alpha=0.9, wd=0.1)
>>> p, state = rules.rmsprop.update(p, -2 * g, state, t=2, lr=0.01, alpha=0.9, wd=0.1)
>>> print(p.round(5), state["v"].round(6))
[ 0.99513 -2.00007] [0.11397  0.049669]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt.scalars import f32
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, momentum: float = 0.0, centered: bool = False, **hyper: Any) -> dict[str, Array]:
    """The mean square, and the mean and the buffer where they are kept, zeros."""
    kept = ("v", *(["a"] if centered else []), *(["buf"] if momentum else []))
    return {name: np.zeros(p.shape, f32) for name in kept}


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    wd: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    eps_at: str = "outside",
) -> tuple[Array, dict[str, Array]]:
    """One step; rounding may leave a variance a little below zero, which counts as zero."""
    oma = f32(1.0 - alpha)
    lr, alpha, eps, wd, mu = f32(lr), f32(alpha), f32(eps), f32(wd), f32(momentum)
    if wd:
        g = g + wd * p
    v = alpha * state["v"] + oma * (g * g)
    z, new = v, {"v": v}
    if centered:
        a = alpha * state["a"] + oma * g
        z = np.maximum(v - a * a, f32(0))
        new = new | {"a": a}
    d = np.sqrt(z + eps) if eps_at == "inside" else np.sqrt(z) + eps
    r = f32(1) / d
    u = g * r
    if mu:
        buf = mu * state["buf"] + u
        u, new = buf, new | {"buf": buf}
    p = p - lr * u
    return p, new


rule = Rule(
    stem="rmsprop",
    title="RMSprop",
    source="Tieleman & Hinton 2012; Graves, arXiv 1308.0850; torch.optim.RMSprop",
    states=(
        State("v", "running mean of g^2", nonnegative=True, torch="square_avg"),
        State("a", "running mean of g", torch="grad_avg", when=lambda hyper: hyper["centered"]),
        State("buf", "momentum buffer", torch="momentum_buffer", when=lambda hyper: hyper["momentum"] != 0),
    ),
    hypers=(
        Hyper("lr", "lr", 1e-2, "learning rate", low=0),
        Hyper("alpha", "alpha", 0.99, "decay of v and a", low=0, high=1, torch="alpha"),
        Hyper("eps", "eps", 1e-8, "added to sqrt(z)", low=0, torch="eps"),
        Hyper("wd", "wd", 0.0, "weight decay, coupled: g + wd p", low=0, torch="weight_decay"),
        Hyper("momentum", "mu", 0.0, "share of the buffer kept", low=0, high=1, torch="momentum"),
        Hyper("centered", "centered", False, "divide by the deviation, not by the root mean square", torch="centered"),
        Hyper(
            "eps_at",
            "eps",
            "outside",
            "outside: sqrt(z) + eps (torch, bitsandbytes); inside: sqrt(z + eps) (TensorFlow)",
            choices=("outside", "inside"),
        ),
    ),
    init=init,
    update=update,
)
