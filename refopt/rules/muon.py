r"""Muon (Jordan 2024, kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982): momentum, orthogonalized.

A momentum matrix is mostly a few strong directions. Muon makes all its singular values about equal, so that rare
directions move as far as common ones; five steps of a Newton-Schulz polynomial do so with products of matrices alone.

======  ===============  =====================================================================  ============
symbol  name             meaning                                                                default
======  ===============  =====================================================================  ============
p       parameter        the weights, a matrix m x n; embeddings and heads take AdamW
g       gradient         of the loss by p
B       momentum matrix  running mean of g
Z       input            what is made orthogonal: B, or a look-ahead
X       direction        near U V^T of Z = U S V^T: singular values 0.68 to 1.20
kappa   shape factor     "original": sqrt(max(1, m / n)); "match_rms_adamw": 0.2 sqrt(max(m,    "original"
                         n)), as long as a step of AdamW (adjust_lr)
lr      learning rate    step length, >= 0                                                      0.02
mu      momentum         share of B kept, [0, 1)                                                0.95
ahead   nesterov         Z = (1 - mu) g + mu B                                                  True
k       ns_steps         Newton-Schulz steps, 0 to 99                                           5
eps     guard            "floor": least norm of Z that counts (torch); "added": to the norm     1e-7 "floor"
                         (Jordan) (eps_at)
wd      weight decay     decoupled: p shrinks by 1 - lr wd, without kappa                       0
======  ===============  =====================================================================  ============

torch.optim.Muon's defaults are lr=1e-3, wd=0.1. The polynomial a x + b x^3 + c x^5 is steep at 0 and does not converge
to 1: singular values below 1.5e-3 of the norm stay small, the others end between 0.68 and 1.20. Its products are taken
in float64 here; bfloat16, which is usual on a GPU, leaves the direction by 1 to 2 per cent of its norm.

State: ``B``, float32, the parameter's shape; 4 bytes a parameter.

At t=1 B is along g, and the step is g with its singular values made equal, however large it was. A momentum too near
1 keeps old directions, which are made as strong as new ones.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([[1, -2], [3, 0.5]]), np.float32([[0.5, 0.25], [-0.1, 0.8]])
>>> p, state = rules.muon.update(p, g, rules.muon.init(p), t=1, lr=0.1, wd=0.1)
>>> p, state = rules.muon.update(p, np.float32([[3, -1], [2, 0.1]]) * g, state, t=2, lr=0.1, wd=0.1)
>>> print(p.astype(float).round(4).tolist(), state["B"].round(4))
[[0.8381, -1.9918], [2.9596, 0.3228]] [[ 0.0988 -0.0006]
 [-0.0148  0.042 ]]
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from refopt.reduce import norm64
from refopt.scalars import f32
from refopt.spec import Array, Hyper, Rule, ShapeError, State

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def init(p: Array, **hyper: Any) -> dict[str, Array]:
    """The momentum, zeros."""
    return {"B": np.zeros(p.shape, f32)}


def orthogonal(Z: Array, ns_steps: int, eps: float, eps_at: str) -> Array:
    """X = U f(S) V^T of Z = U S V^T, f the polynomial applied ns_steps times to S / norm(Z); float64."""
    a, b, c = NEWTON_SCHULZ
    norm = norm64(Z)
    X = (Z.T if Z.shape[0] > Z.shape[1] else Z) / (np.maximum(norm, eps) if eps_at == "floor" else norm + eps)
    for _ in range(int(ns_steps)):
        A = X @ X.T
        X = a * X + (b * A + c * (A @ A)) @ X
    return X.T if Z.shape[0] > Z.shape[1] else X


def shape_factor(shape: tuple[int, ...], adjust_lr: str) -> float:
    """kappa."""
    m, n = shape
    return sqrt(max(1.0, m / n)) if adjust_lr == "original" else 0.2 * sqrt(max(m, n))


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 0.02,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    adjust_lr: str = "original",
    eps: float = 1e-7,
    eps_at: str = "floor",
    wd: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """One step; the direction is rounded to float32 once."""
    if not p.size:
        return p, state
    mu, ommu = f32(momentum), f32(1.0 - momentum)
    decay, step = f32(1.0 - lr * wd), f32(lr * shape_factor(p.shape, adjust_lr))
    B = mu * state["B"] + ommu * g
    Z = ommu * g + mu * B if nesterov else B
    X = orthogonal(Z.astype(np.float64), ns_steps, eps, eps_at).astype(f32)
    p = p * decay
    p = p - step * X
    return p, {"B": B}


def fits(call: str, shape: tuple[int, ...], hyper: dict[str, Any]) -> None:
    """A matrix."""
    if len(shape) != 2:
        raise ShapeError(f"{call} has shape {shape}; muon needs two axes (flatten a convolution to (out, -1))")


rule = Rule(
    stem="muon",
    title="Muon",
    source="Jordan 2024; Liu et al., arXiv 2502.16982; torch.optim.Muon",
    states=(State("B", "momentum matrix", torch="momentum_buffer"),),
    hypers=(
        Hyper("lr", "lr", 0.02, "learning rate", low=0),
        Hyper("momentum", "mu", 0.95, "share of B kept", low=0, high=1, torch="momentum"),
        Hyper("nesterov", "nesterov", True, "orthogonalize (1 - mu) g + mu B, not B", torch="nesterov"),
        Hyper("ns_steps", "ns_steps", 5, "Newton-Schulz steps", low=0, high=100, torch="ns_steps", whole=True),
        Hyper(
            "adjust_lr",
            "kappa",
            "original",
            "original: lr sqrt(max(1, m / n)); match_rms_adamw (Moonshot): 0.2 lr sqrt(max(m, n))",
            torch="adjust_lr_fn",
            choices=("original", "match_rms_adamw"),
        ),
        Hyper("eps", "eps", 1e-7, "guard of the norm of Z", low=0, torch="eps"),
        Hyper(
            "eps_at",
            "eps_at",
            "floor",
            "floor: max(norm, eps) (torch); added: norm + eps (Jordan)",
            choices=("floor", "added"),
        ),
        Hyper("wd", "wd", 0.0, "weight decay, decoupled: p (1 - lr wd)", low=0, torch="weight_decay"),
    ),
    init=init,
    update=update,
    fits=fits,
    scope="matrix",
    tier="T2",
)
