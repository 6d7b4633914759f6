r"""GaLore (Zhao et al., arXiv 2403.03507, Algorithm 2): Adam on the gradient's strongest directions.

Gradients of large layers are nearly of low rank. GaLore finds their r strongest directions every `gap` steps, keeps
Adam's moments of the projected gradient alone, and projects the step back: every weight moves, few are remembered.

======  =============  =====================================================================  =========
symbol  name           meaning                                                                default
======  =============  =====================================================================  =========
p       parameter      the weights, a matrix m x n
g       gradient       of the loss by p
P, Q    bases          r left singular vectors of g (m x r), r right ones (n x r)
R       projection     P^T g ("left"), g Q ("right"), P^T g Q ("full")
side    proj_type      which; "std" projects the longer side's gradient to the shorter side:  "std"
                       right where m >= n, else left; "reverse_std" the other way round
r       rank           directions kept, 1 to min(m, n)                                        128
T       gap            steps between two looks for directions, >= 1                           200
alpha   scale          of the step that is projected back                                     0.25
m, v    moments        of R, as Adam's; neither turned nor reset when the directions change
N       step           m / (sqrt(v) + eps); R with inner="sgd"                                "adam"
lr      learning rate  step length, >= 0                                                      1e-3
beta1   decay of m     [0, 1)                                                                 0.9
beta2   decay of v     [0, 1)                                                                 0.999
eps     guard          added to sqrt(v) before the bias correction, >= 0                      1e-6
wd      weight decay   after the step: p shrinks by 1 - lr wd, whatever alpha                 0
======  =============  =====================================================================  =========

Singular vectors have no sign of their own: here the entry of largest magnitude, the first of equals, is positive. In a
period the sign cancels; at its end the old m is read in the new directions. Decomposition and products are taken in
float64.

State: ``P`` or ``Q`` (both if "full"), and ``m``, ``v`` of the shape of R: 4 (m r + 2 n r) bytes for "left",
4 (n r + 2 m r) for "right", 4 r (m + n + 2 r) for "full"; no m and v with inner="sgd". All float32; 8-bit GaLore
codes m and v (``codecs="dynamic8"``), the bases stay.

At t=1 the directions are those of the first gradient, and the step is the sign of R, projected back, alpha lr times.
A beta2 near 1 forgets slowly: after quiet steps a sudden gradient moves a direction by up to (1 - beta1) / sqrt(1 -
beta2) alpha lr; a small one makes v the last square of R, and steps leap where R comes near 0; a gap too long keeps
directions that the gradient has left, and nothing moves outside them.

>>> import numpy as np
>>> from refopt import rules
>>> p, g = np.float32([[1, -2], [3, 0.5]]), np.float32([[0.5, 0.25], [-0.1, 0.8]])
>>> hyper = {"lr": 0.1, "rank": 1, "wd": 0.1}
>>> p, state = rules.galore.update(p, g, rules.galore.init(p, **hyper), t=1, **hyper)
>>> p, state = rules.galore.update(p, -2 * g, state, t=2, **hyper)
>>> print(p.astype(float).round(4).tolist(), state["Q"][:, 0].round(4), state["m"][:, 0].round(4))
[[0.9786, -1.9756], [2.9388, 0.4747]] [0.1002 0.995 ] [-0.0329 -0.0865]
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from refopt.scalars import f32, ipow
from refopt.spec import Array, Hyper, Rule, ShapeError, State

SIDES = {"left": (True, False), "right": (False, True), "full": (True, True)}


def sides(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the rows are projected (P), and whether the columns are (Q)."""
    kind, right = hyper["proj_type"], shape[0] >= shape[1]
    if kind in ("std", "reverse_std"):
        kind = "right" if right == (kind == "std") else "left"
    return SIDES[kind]


def shape_of_P(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...] | None:
    """A column a direction, where rows are projected."""
    return (shape[0], int(hyper["rank"])) if sides(shape, hyper)[0] else None


def shape_of_Q(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...] | None:
    """A column a direction, where columns are projected."""
    return (shape[1], int(hyper["rank"])) if sides(shape, hyper)[1] else None


def shape_of_R(shape: tuple[int, ...], hyper: dict[str, Any]) -> tuple[int, ...]:
    """Rank in place of each side that is projected."""
    rows, columns = sides(shape, hyper)
    return int(hyper["rank"]) if rows else shape[0], int(hyper["rank"]) if columns else shape[1]


def init(p: Array, **hyper: Any) -> dict[str, Array]:
    """Zeros; the bases are found at the first step."""
    shapes = rule.shapes(p.shape, rule.check("rules.galore.init", hyper))
    return {name: np.zeros(shape, f32) for name, shape in shapes.items()}


def canonical(vectors: Array, rank: int) -> Array:
    """The first `rank` columns, each with its largest entry positive; rounded first, so that equals are equal."""
    kept = vectors[:, :rank].astype(f32)
    largest = np.take_along_axis(kept, np.abs(kept).argmax(0)[None], 0)
    return kept * np.where(largest < 0, f32(-1), f32(1))


def bases(g: Array, rank: int) -> tuple[Array, Array]:
    """The strongest left and right singular vectors; of a gradient that is not finite there are none, but NaN."""
    if not np.isfinite(g).all():
        return np.full((g.shape[0], rank), np.nan, f32), np.full((g.shape[1], rank), np.nan, f32)
    U, _, Vt = np.linalg.svd(g.astype(np.float64), full_matrices=False)
    return canonical(U, rank), canonical(Vt.T, rank)


def project(P: Array | None, x: Array, Q: Array | None) -> Array:
    """P^T x Q, without a basis that is not there; in float64, rounded once."""
    x = x.astype(np.float64)
    x = x if P is None else P.T @ x
    return (x if Q is None else x @ Q).astype(f32)


def project_back(P: Array | None, x: Array, Q: Array | None) -> Array:
    """P x Q^T."""
    x = x.astype(np.float64)
    x = x if P is None else P @ x
    return (x if Q is None else x @ Q.T).astype(f32)


def update(
    p: Array,
    g: Array,
    state: dict[str, Array],
    *,
    t: int,
    lr: float = 1e-3,
    rank: int = 128,
    gap: int = 200,
    scale: float = 0.25,
    proj_type: str = "std",
    inner: str = "adam",
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-6,
    wd: float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """One step; at t = 1, 1 + gap, 1 + 2 gap, ... the directions are found anew, before they are used."""
    rows, columns = sides(p.shape, {"proj_type": proj_type})
    adam = inner == "adam"
    omb1, omb2 = f32(1.0 - beta1), f32(1.0 - beta2)
    step = f32(lr * sqrt(1.0 - ipow(beta2, t)) / (1.0 - ipow(beta1, t)) if adam else lr)
    decay = f32(lr * wd)
    beta1, beta2, eps, alpha = f32(beta1), f32(beta2), f32(eps), f32(scale)
    found = bases(g, int(rank)) if (t - 1) % int(gap) == 0 else (state.get("P"), state.get("Q"))
    P = np.array(found[0]) if rows else None
    Q = np.array(found[1]) if columns else None
    R = N = project(P, g, Q)
    if adam:
        m = beta1 * state["m"] + omb1 * R
        v = beta2 * state["v"] + omb2 * (R * R)
        N = m * (f32(1) / (np.sqrt(v) + eps))
    U = project_back(P, N, Q)
    p = p - step * (alpha * U)
    p = p - decay * p
    new = ({"P": P} if rows else {}) | ({"Q": Q} if columns else {}) | ({"m": m, "v": v} if adam else {})
    return p, new


def fits(call: str, shape: tuple[int, ...], hyper: dict[str, Any]) -> None:
    """A matrix with at least `rank` rows and columns."""
    if len(shape) != 2:
        raise ShapeError(f"{call} has shape {shape}; galore needs two axes, others take adamw")
    if hyper["rank"] > min(shape):
        raise ValueError(f"{call} has shape {shape}; rank must be <= {min(shape)}, got {hyper['rank']!r}")


rule = Rule(
    stem="galore",
    title="GaLore",
    source="Zhao et al., arXiv 2403.03507, Algorithm 2",
    states=(
        State("P", "left basis", shape=shape_of_P, coded=False),
        State("Q", "right basis", shape=shape_of_Q, coded=False),
        State("m", "first moment of R", shape=shape_of_R, when=lambda hyper: hyper["inner"] == "adam"),
        State(
            "v",
            "second moment of R",
            nonnegative=True,
            shape=shape_of_R,
            when=lambda hyper: hyper["inner"] == "adam",
        ),
    ),
    hypers=(
        Hyper("lr", "lr", 1e-3, "learning rate", low=0),
        Hyper("rank", "r", 128, "directions kept", low=1, torch="rank", whole=True),
        Hyper("gap", "T", 200, "steps between two looks for directions", low=1, torch="update_proj_gap", whole=True),
        Hyper("scale", "alpha", 0.25, "of the step that is projected back", low=0, torch="scale"),
        Hyper(
            "proj_type",
            "proj_type",
            "std",
            "std: right where m >= n, else left",
            torch="proj_type",
            choices=("std", "reverse_std", "left", "right", "full"),
        ),
        Hyper("inner", "N", "adam", "the rule that steps R", choices=("adam", "sgd")),
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
)
