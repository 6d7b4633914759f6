r"""APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270, Algorithm 1): SGD whose channels are as long as Adam's.

What Adam does to a gradient is mostly to scale it. APOLLO keeps Adam's moments of a random projection of the gradient,
reads off by how much they scale each channel, and scales the whole gradient so; no decomposition, hardly any state.

======  =============  =====================================================================  =========
symbol  name           meaning                                                                default
======  =============  =====================================================================  =========
p       parameter      the weights, a matrix m x n
g       gradient       of the loss by p
P       projection     normal numbers over sqrt(r); drawn anew every `gap` steps, from the
                       seed, the tensor's number and the number of the period; not stored
R       projected g    P^T g ("left") or g P ("right")
side    proj_type      "std": right where m >= n, else left; "reverse_std", "left", "right"   "std"
r       rank           columns of P, 1 to min(m, n)                                           256
T       gap            steps between two draws of P, >= 1                                     200
m, v    moments        of R, as Adam's; they stay when P changes
N       update of R    m / (sqrt(v) + eps), as Adam's
f       factor         norm of N / norm of R; of each channel (column for "left", row for
                       "right") or of all (scale_type "tensor")                               "channel"
S       scaled g       f g, times sqrt(scale)
s       scale          enters as its root                                                     1
front   scale_front    S is scaled before the limiter, not after                              False
limit   limiter        the norm of S grows by 1 % a step at most (Fira, arXiv 2410.01623)     True
prev    norm of S      of the step before, as limited
lr      learning rate  step length, >= 0                                                      1e-3
beta1   decay of m     [0, 1)                                                                 0.9
beta2   decay of v     [0, 1)                                                                 0.999
eps     guard          added to sqrt(v) before the bias correction, >= 0                      1e-6
wd      weight decay   after the step: p shrinks by 1 - lr wd                                 0
======  =============  =====================================================================  =========

APOLLO-Mini: ``rank=1, scale=128, scale_type="tensor"``. Products are taken in float64.

State: ``m``, ``v`` of the shape of R, 8 r max(m, n) bytes with "std", and the number ``prev``; all float32.

At t=1 the projection scaled by Adam is all signs, so a channel is multiplied by sqrt(r) / norm(its R) and by
sqrt(scale). A wrong beta2 does what it does to Adam, to a channel at a time.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([[1, -2], [3, 0.5]]), np.float32([[0.5, 0.25], [-0.1, 0.8]])
>>> hyper = {"lr": 0.1, "rank": 1, "wd": 0.1}
>>> p, state = rules.apollo.update(p, g, rules.apollo.init(p, **hyper), t=1, **hyper)
>>> p, state = rules.apollo.update(p, -2 * g, state, t=2, **hyper)
>>> print(p.astype(float).round(4).tolist(), state["m"][:, 0].round(4), state["prev"].round(4))
[[0.8923, -2.0041], [2.9518, 0.3979]] [-0.0387 -0.059 ] 3.405
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from refopt.reduce import norm64, r256_rows, squares
from refopt.rng import key, normals
from refopt.scalars import f32, ipow
from refopt.spec import Array, Hyper, Rule, ShapeError, State

GROWTH = 1.01


def is_left(shape: tuple[int, ...], proj_type: str) -> bool:
    """Whether the rows are projected; else the columns are."""
    if proj_type in ("left", "right"):
        return proj_type == "left"
    return (shape[0] < shape[1]) == (proj_type == "std")


def shape_of_R(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...]:
    """Rank in place of the side that is projected."""
    rank = int(hyper["rank"])
    return (rank, shape[1]) if is_left(shape, hyper["proj_type"]) else (shape[0], rank)


def init(p: Array, **hyper: Any) -> dict[str, Array]:
    """Zeros."""
    shapes = rule.shapes(p.shape, rule.check("rules.apollo.init", hyper))
    return {name: np.zeros(shape, f32) for name, shape in shapes.items()}


def projection(seed: int, period: int, tensor: int, n: int, rank: int) -> Array:
    """P (n x rank) of a period, counted from 1."""
    return (normals(key(seed, period, tensor), n * rank) / sqrt(rank)).astype(f32).reshape(n, rank)


def factor(N: Array, R: Array, left: bool, scale_type: str) -> Array:
    """norm of N / norm of R: one number, or one a channel, standing along the side that is whole."""
    if scale_type == "tensor":
        return np.asarray(f32(norm64(N) / (norm64(R) + 1e-8)))
    n, r = (np.sqrt(r256_rows(squares(x.T if left else x))) for x in (N, R))
    f = (n / (r + 1e-8)).astype(f32)
    return f if left else f[:, None]


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    tensor: int = 0,
    seed: int = 0,
    lr: float = 1e-3,
    rank: int = 256,
    gap: int = 200,
    scale: float = 1.0,
    scale_type: str = "channel",
    scale_front: bool = False,
    limiter: bool = True,
    proj_type: str = "std",
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    wd: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """One step; with the limiter, the first sets the length that later ones grow from."""
    omb1, omb2 = f32(1.0 - beta1), f32(1.0 - beta2)
    step = f32(lr * sqrt(1.0 - ipow(beta2, t)) / (1.0 - ipow(beta1, t)))
    decay, root = f32(lr * wd), f32(sqrt(scale))
    beta1, beta2, eps = f32(beta1), f32(beta2), f32(eps)
    left = is_left(p.shape, proj_type)
    P = projection(seed, (t - 1) // int(gap) + 1, tensor, p.shape[0 if left else 1], int(rank)).astype(np.float64)
    R = (P.T @ g if left else g @ P).astype(f32)
    m = beta1 * state["m"] + omb1 * R
    v = beta2 * state["v"] + omb2 * (R * R)
    N = m * (f32(1) / (np.sqrt(v) + eps))
    S = factor(N, R, left, scale_type) * g
    new = {"m": m, "v": v}
    if scale_front:
        S = S * root
    if limiter:
        norm = norm64(S)
        grown = 1.0 if t == 1 else np.maximum(norm / (float(state["prev"]) + 1e-8), GROWTH) / GROWTH
        S = S * f32(1.0 / grown)
        prev = np.asarray(f32(norm / grown))
        new = new | {"prev": prev}
    if not scale_front:
        S = S * root
    p = p - step * S
    p = p - decay * p
    return p, new


def fits(call: str, shape: tuple[int, ...], hyper: dict[str, Any]) -> None:
    """A matrix with at least `rank` rows and columns."""
    if len(shape) != 2:
        raise ShapeError(f"{call} has shape {shape}; apollo needs two axes, others take adamw")
    if hyper["rank"] > min(shape):
        raise ValueError(f"{call} has shape {shape}; rank must be <= {min(shape)}, got {hyper['rank']!r}")


rule = Rule(
    stem="apollo",
    title="APOLLO",
    source="Zhu et al., arXiv 2412.05270, Algorithm 1",
    states=(
        State("m", "first moment of R", shape=shape_of_R),
        State("v", "second moment of R", nonnegative=True, shape=shape_of_R),
        State(
            "prev",
            "norm of S at the step before",
            nonnegative=True,
            when=lambda hyper: hyper["limiter"],
            shape=lambda shape, hyper: (),
            coded=False,
        ),
    ),
    hypers=(
        Hyper("lr", "lr", 1e-3, "learning rate", low=0),
        Hyper("rank", "r", 256, "columns of the projection; 1 in APOLLO-Mini", low=1, torch="rank", whole=True),
        Hyper("gap", "T", 200, "steps between two draws of P", low=1, torch="update_proj_gap", whole=True),
        Hyper("scale", "scale", 1.0, "enters as its root; 128 in APOLLO-Mini", low=0, torch="scale"),
        Hyper(
            "scale_type",
            "f",
            "channel",
            "one factor a channel, or one in all: APOLLO-Mini",
            torch="scale_type",
            choices=("channel", "tensor"),
        ),
        Hyper("scale_front", "scale_front", False, "scale before the limiter, not after", torch="scale_front"),
        Hyper("limiter", "limiter", True, "the norm of S grows by 1 % a step at most"),
        Hyper(
            "proj_type",
            "proj_type",
            "std",
            "std: right where m >= n, else left",
            torch="proj_type",
            choices=("std", "reverse_std", "left", "right"),
        ),
        Hyper("beta1", "beta1", 0.9, "decay of m", low=0, high=1, torch="betas[0]"),
        Hyper("beta2", "beta2", 0.999, "decay of v", low=0, high=1, torch="betas[1]"),
        Hyper("eps", "eps", 1e-6, "added to sqrt(v), before the bias correction", low=0, torch="eps"),
        Hyper("wd", "wd", 0.0, "weight decay, decoupled, after the step", low=0, torch="weight_decay"),
    ),
    init=init,
    update=update,
    fits=fits,
    scope="matrix",
    tier="T2",
    random=True,
)
