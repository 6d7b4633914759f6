r"""SGD with momentum (Polyak 1964; Sutskever et al. 2013), in the dialect of torch.optim.SGD.

Plain gradient descent forgets each gradient at once. Momentum keeps a running sum, so that directions on which many
gradients agree grow and noise cancels: the one state that even the smallest optimizer pays for.

======  ==================  =============================  =========
symbol  name                meaning                        default
======  ==================  =============================  =========
p       parameter           the weights
g       gradient            of the loss by p
b       buf                 momentum buffer
lr      learning rate       step length, >= 0              1e-3
mu      momentum            share of b kept, [0, 1)        0
tau     dampening           share of g dropped after t=1   0
wd      weight decay        coupled (L2), >= 0             0
======  ==================  =============================  =========

State: ``buf``, float32, the parameter's shape; 4 bytes a parameter, none when ``momentum=0``.

At t=1 b is g itself, undamped. A momentum too near 1 adds up gradients of slopes long left: each moves a weight by lr
/ (1 - momentum) in all, and the sum overshoots.

``lr_at="inside"`` multiplies g by lr on its way into b, as Sutskever and Keras do: a new lr then leaves history alone.
``decay="decoupled"`` shrinks the old weights instead (SGDW). With the defaults it is torch's, bit for bit.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([1, -2]), np.float32([0.5, 0.25])
>>> state = rules.sgd.init(p, momentum=0.9)
>>> p, state = rules.sgd.update(p, g, state, t=1, lr=0.1, momentum=0.9, wd=0.1)
>>> p, state = rules.sgd.update(p, g, state, t=2, lr=0.1, momentum=0.9, wd=0.1)
>>> print(p.round(5), state["buf"].round(5))
[ 0.8266  -2.01445] [1.134  0.0945]
"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt.scalars import f32
from refopt.spec import Array, Hyper, Rule, State


def init(p: Array, momentum: float = 0.0, **hyper: Any) -> dict[str, Array]:
    """The momentum buffer, zeros; nothing when ``momentum=0``."""
    return {"buf": np.zeros(p.shape, f32)} if momentum else {}


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    wd: float = 0.0,
    lr_at: str = "outside",
    decay: str = "coupled",
) -> tuple[Array, dict[str, Array]]:
    """One step. The first (t=1) takes g whole: dampening starts at the second, as in torch."""
    keep = f32(1.0 - lr * wd)
    lr, mu, wd, damp = f32(lr), f32(momentum), f32(wd), f32(1.0 - dampening)
    if decay == "decoupled":
        p = p * keep
    elif wd:
        g = g + wd * p
    if lr_at == "inside":
        g, lr = lr * g, f32(1)
    d = g
    if mu:
        b = g.copy() if t == 1 else mu * state["buf"] + damp * g
        d = g + mu * b if nesterov else b
        state = {"buf": b}
    p = p - lr * d
    return p, state


def together(call: str, hyper: dict[str, Any]) -> None:
    """Nesterov's look-ahead needs a momentum and takes no dampening."""
    if hyper["nesterov"] and (hyper["momentum"] <= 0 or hyper["dampening"] != 0):
        raise ValueError(
            f"{call}: nesterov needs momentum > 0 and dampening = 0, "
            f"got momentum={hyper['momentum']!r}, dampening={hyper['dampening']!r}"
        )


rule = Rule(
    stem="sgd",
    title="SGD with momentum",
    source="Sutskever et al. 2013; torch.optim.SGD",
    states=(State("buf", "momentum buffer", torch="momentum_buffer", when=lambda hyper: hyper["momentum"] != 0),),
    hypers=(
        Hyper("lr", "lr", 1e-3, "learning rate", low=0),
        Hyper("momentum", "mu", 0.0, "share of the buffer kept", low=0, high=1, torch="momentum"),
        Hyper("dampening", "tau", 0.0, "share of the gradient dropped after the first step", low=0, torch="dampening"),
        Hyper("nesterov", "nesterov", False, "step along g + mu b instead of b", torch="nesterov"),
        Hyper("wd", "wd", 0.0, "weight decay, coupled: g + wd p", low=0, torch="weight_decay"),
        Hyper(
            "lr_at",
            "lr",
            "outside",
            "outside: lr times b (torch, bitsandbytes); inside: lr times g goes into b (Keras, Sutskever)",
            choices=("outside", "inside"),
        ),
        Hyper(
            "decay",
            "wd",
            "coupled",
            "coupled: g + wd p (torch); decoupled: p (1 - lr wd) (FlashOptim's SGDW, optimi)",
            choices=("coupled", "decoupled"),
        ),
    ),
    init=init,
    update=update,
    together=together,
)
