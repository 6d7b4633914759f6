"""`GaLoreAdamW`: Adam on the strongest directions of each gradient, with the words of galore_torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor

from refopt.rules import RULES
from refopt.spec import Rule
from refopt_cuda.optim import states
from refopt_cuda.optim.matrix import MatrixOptimizer, Work
from refopt_cuda.scalars import ipow

KEYS = {"P": "P", "Q": "Q", "m": "exp_avg", "v": "exp_avg_sq"}
"""What `state[p]` calls the states of the rule."""
ADAM: dict[str, tuple[str, int | None]] = {
    "lr": ("lr", None),
    "beta1": ("betas", 0),
    "beta2": ("betas", 1),
    "eps": ("eps", None),
    "wd": ("weight_decay", None),
}
PROJECTED: dict[str, tuple[str, int | None]] = {
    "rank": ("rank", None),
    "gap": ("update_proj_gap", None),
    "scale": ("scale", None),
    "proj_type": ("proj_type", None),
}


class GaLoreAdamW(MatrixOptimizer):
    """AdamW whose moments are kept of projected gradients (Zhao et al., arXiv 2403.03507), as galore_torch.GaLoreAdamW.

    params           parameters or groups; float32, bfloat16 or float16, gradients likewise. A group with a `rank` holds
                     matrices and is projected; one without takes AdamW as galore_torch has it: eps before the bias
                     correction, decay after the step
    lr               step length, >= 0
    betas            decay of the two moments, each in [0, 1)
    eps              added to the root of the second moment, before the bias correction
    weight_decay     decoupled, after the step: p shrinks by 1 - lr weight_decay
    rank             directions kept, 1 to the shorter side; None: no projection
    update_proj_gap  steps between two looks for directions
    scale            of the step that is projected back
    proj_type        "std": the shorter side is projected; "reverse_std": the longer; "left", "right", "full": rows,
                     columns, both

    State: `step`, `exp_avg` and `exp_avg_sq` of the projected gradient's shape, `P` (rows x rank) and `Q` (columns x
    rank) as far as they are used; all float32. Moments stay when directions change. Directions are singular vectors in
    float64, the largest entry of each positive; of the shorter side they are found by its Gram matrix. Looking for them
    waits for the device; other steps do not. Products are in float32 and obey torch.backends.cuda.matmul.allow_tf32.

    Raises TypeError, ValueError or ShapeError that name the argument, and StateError for a state that was altered;
    nothing is changed then.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: str = "std",
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "proj_type": proj_type,
        }
        self._hyper(defaults, type(self).__name__)
        super().__init__(params, defaults)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["adamw"] if group["rank"] is None else RULES["galore"]

    def _words(self, group: Mapping[str, Any]) -> Mapping[str, tuple[str, int | None]]:
        return ADAM if group["rank"] is None else ADAM | PROJECTED

    def _parts(self, group: Mapping[str, Any], hyper: Mapping[str, Any], shape: tuple[int, ...]) -> list[states.Part]:
        shapes = self._rule(group).shapes(shape, dict(hyper))
        return [states.Part(KEYS[name], s, torch.float32, 0.0) for name, s in shapes.items()]

    def _run(self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work]) -> None:
        whole = [_projected(w, hyper) if "rank" in hyper else Projected(w, w.g.float()) for w in work]
        for t in sorted({w.t for w in work}):
            some = [x for x in whole if x.work.t == t]
            for x, N in zip(some, _adam(some, hyper), strict=True):
                _move(x.work, N, hyper)


class Projected(NamedTuple):
    """One parameter and its gradient on the directions kept, float32."""

    work: Work
    R: Tensor


def _projected(w: Work, hyper: Mapping[str, Any]) -> Projected:
    """R, on new directions where the period begins."""
    P, Q, g = w.state.get("P"), w.state.get("Q"), w.g.float()
    if (w.t - 1) % int(hyper["gap"]) == 0:
        if P is not None:
            P.copy_(basis(g, int(hyper["rank"])))
        if Q is not None:
            Q.copy_(basis(g.mT, int(hyper["rank"])))
    if P is not None and Q is not None:  # in float64: off the diagonal of new directions R is 0, and Adam divides by it
        return Projected(w, (P.double().mT @ g.double() @ Q.double()).float())
    return Projected(w, P.mT @ g if P is not None else g @ Q)  # type: ignore[operator]


def basis(g: Tensor, rank: int) -> Tensor:
    """The first left singular vectors, a column each; of a gradient that is not finite there are none, but NaN."""
    if not g.isfinite().all():
        return g.new_full((g.shape[0], rank), float("nan"))
    g = g.double()
    if g.shape[0] <= g.shape[1]:
        g = g / g.abs().amax().clamp(min=1e-300)  # squares must not overflow
        kept = torch.linalg.eigh(g @ g.mT).eigenvectors.flip(1)[:, :rank].float()
    else:
        kept = torch.linalg.svd(g, full_matrices=False).U[:, :rank].float()
    size = kept.abs()
    rows = torch.arange(len(kept), device=g.device)[:, None]
    first = rows.where(size == size.amax(0), len(kept)).amin(0)
    return kept * kept.gather(0, first[None]).sign()


def _adam(some: list[Projected], hyper: Mapping[str, Any]) -> list[Tensor]:
    """The moments' new values, and N = m / (sqrt(v) + eps)."""
    m, v = ([x.work.state[key] for x in some] for key in ("exp_avg", "exp_avg_sq"))
    R, beta1, beta2 = [x.R for x in some], hyper["beta1"], hyper["beta2"]
    torch._foreach_mul_(m, beta1)
    torch._foreach_add_(m, R, alpha=1.0 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, R, R, value=1.0 - beta2)
    below = torch._foreach_sqrt(v)
    torch._foreach_add_(below, hyper["eps"])
    return list(torch._foreach_div(m, below))


def _move(w: Work, N: Tensor, hyper: Mapping[str, Any]) -> None:
    """p <- (p - step scale P N Q^T) (1 - lr wd), in one product where there is one."""
    lr, keep = hyper["lr"], 1.0 - hyper["lr"] * hyper["wd"]
    step = lr * sqrt(1.0 - ipow(hyper["beta2"], w.t)) / (1.0 - ipow(hyper["beta1"], w.t))
    P, Q, p = w.state.get("P"), w.state.get("Q"), w.p.float()
    if P is not None and Q is not None:
        N, P = P @ N, None
    if P is None and Q is None:
        p.sub_(N, alpha=step).mul_(keep)
    else:
        one, other = (N, Q.mT) if P is None else (P, N)  # type: ignore[union-attr]
        p.addmm_(one, other, beta=keep, alpha=-keep * step * hyper["scale"])
    if p is not w.p:
        w.p.copy_(p)
