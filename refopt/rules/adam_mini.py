r"""Adam-mini (Zhang et al., arXiv 2406.16793, Algorithm 1): AdamW with one second moment for each block of weights.

Inside a block of a transformer's Hessian all weights can share one step length. Adam-mini keeps one second moment for
each output row, each attention head or the whole tensor, and so half of AdamW's state.

======  =============  ====================================================================  =========
symbol  name           meaning                                                               default
======  =============  ====================================================================  =========
p       parameter      the weights
g       gradient       of the loss by p
b       block          "rows": each index of the first axis (embeddings, head, values,       "rows"
                       outputs, MLP); "heads": the first axis in `heads` equal parts
                       (queries, keys); "whole" (norms); "elementwise": AdamW (biases)
h       heads          how many, only with blocks="heads"                                    1
m       first moment   running mean of g
v       second moment  running mean of the mean of g^2 in each block, never negative
k       step of b      of each block, one number
lr      learning rate  step length, >= 0                                                     1e-3
beta1   decay of m     [0, 1)                                                                0.9
beta2   decay of v     [0, 1)                                                                0.999
eps     guard          added to sqrt(v), >= 0                                                1e-8
wd      weight decay   decoupled: p shrinks by 1 - lr wd                                     0
======  =============  ====================================================================  =========

State: ``m``, 4 bytes a parameter; ``v``, 4 bytes a block. Both float32.

At t=1 a weight moves by lr g / RMS(g of its block). A wrong beta2 does what it does to AdamW, to a block at a time; a
block too large divides quiet weights by the gradients of busy ones, and they hardly move.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([[1, -2], [3, 0.5]]), np.float32([[0.5, 0.25], [-0.1, 0.8]])
>>> p, state = rules.adam_mini.update(p, g, rules.adam_mini.init(p), t=1, lr=0.1, wd=0.1)
>>> p, state = rules.adam_mini.update(p, -2 * g, state, t=2, lr=0.1, wd=0.1)
>>> print(p.astype(float).round(4).tolist(), state["v"].round(6))
[[0.9012, -1.9997], [2.9512, 0.4025]] [0.000781 0.001625]
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from refopt.reduce import squares, total
from refopt.scalars import f32, ipow
from refopt.spec import Array, Hyper, Rule, ShapeError, State


def blocks_of(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...]:
    """The shape of v: an entry a block."""
    kind = hyper["blocks"]
    return {"rows": shape[:1], "heads": (int(hyper["heads"]),), "whole": (), "elementwise": shape}[kind]


def init(p: Array, blocks: str = "rows", heads: int = 1, **hyper: Any) -> dict[str, Array]:
    """Both moments, zeros."""
    v = np.zeros(blocks_of(p.shape, {"blocks": blocks, "heads": heads}), f32)
    return {"m": np.zeros(p.shape, f32), "v": v}


def mean_squares(g: Array, blocks: str, heads: int) -> Array:
    """The mean of g^2 in each block, summed in float64 in the canonical order."""
    x = squares(g)
    if blocks == "elementwise":
        return x.astype(f32)
    if blocks == "whole":
        return np.asarray(f32(total(x) / x.size))
    parts = x.reshape(len(x), -1) if blocks == "rows" else x.reshape(int(heads), -1, *x.shape[1:])
    return np.array([total(b) / b.size for b in parts]).astype(f32)


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    wd: float = 0.0,
    blocks: str = "rows",
    heads: int = 1,
) -> tuple[Array, dict[str, Array]]:
    """One step; reciprocal and root are taken once a block."""
    if not p.size:
        return p, state
    omb1, omb2 = f32(1.0 - beta1), f32(1.0 - beta2)
    ibc1 = f32(1.0 / (1.0 - ipow(beta1, t)))
    ir2 = f32(1.0 / sqrt(1.0 - ipow(beta2, t)))
    decay = f32(1.0 - lr * wd)
    lr, beta1, beta2, eps = f32(lr), f32(beta1), f32(beta2), f32(eps)
    p = p * decay
    q = mean_squares(g, blocks, heads)
    v = beta2 * state["v"] + omb2 * q
    m = beta1 * state["m"] + omb1 * g
    d = np.sqrt(v) * ir2 + eps
    k = ibc1 * (f32(1) / d)
    u = (m.reshape(k.size, -1) * k.reshape(-1, 1)).reshape(p.shape)
    p = p - lr * u
    return p, {"m": m, "v": v}


def together(call: str, hyper: dict[str, Any]) -> None:
    """Heads are counted for blocks of heads alone."""
    if hyper["heads"] != 1 and hyper["blocks"] != "heads":
        raise ValueError(f"{call}: heads must be 1 with blocks={hyper['blocks']!r}, got {hyper['heads']!r}")


def fits(call: str, shape: tuple[int, ...], hyper: dict[str, Any]) -> None:
    """The blocks tile the tensor."""
    if hyper["blocks"] in ("rows", "heads") and len(shape) < 2:
        raise ShapeError(f"{call} has shape {shape}; blocks={hyper['blocks']!r} needs two axes or more")
    if hyper["blocks"] == "heads" and shape[0] % hyper["heads"]:
        raise ValueError(f"{call} has shape {shape}; {hyper['heads']} heads do not divide its first axis")


rule = Rule(
    stem="adam_mini",
    title="Adam-mini",
    source="Zhang et al., arXiv 2406.16793, Algorithm 1",
    states=(
        State("m", "first moment"),
        State("v", "second moment of each block", nonnegative=True, shape=blocks_of, coded=False),
    ),
    hypers=(
        Hyper("lr", "lr", 1e-3, "learning rate", low=0),
        Hyper("beta1", "beta1", 0.9, "decay of m", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.999, "decay of v", low=0, high=1, torch="betas[1]"),
        Hyper("eps", "eps", 1e-8, "added to sqrt(v)", low=0, torch="eps"),
        Hyper("wd", "wd", 0.0, "weight decay, decoupled: p (1 - lr wd)", low=0, torch="weight_decay"),
        Hyper("blocks", "b", "rows", "which weights share v", choices=("rows", "heads", "whole", "elementwise")),
        Hyper("heads", "h", 1, "equal parts of the first axis, with blocks='heads'", low=1, whole=True),
    ),
    init=init,
    update=update,
    together=together,
    fits=fits,
    scope="tensor",
    tier="T1",
)
