"""`APOLLOAdamW`: the gradient, each channel as long as Adam would have it, with the words of apollo_torch."""

from __future__ import annotations

from collections.abc import Mapping
from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor

from refopt.rules import RULES
from refopt.spec import Rule
from refopt_cuda.optim import states
from refopt_cuda.optim.galore import ADAM, PROJECTED, GaLoreAdamW, Projected, adam, corrected, in_turn, move
from refopt_cuda.optim.matrix import MatrixOptimizer, Work
from refopt_cuda.random import FIRST, GOLDEN, SECOND, key, step_word

WORDS = ADAM | PROJECTED | {"scale_type": ("scale_type", None), "scale_front": ("scale_front", None)}
NORMALS = 1 << 48
"""Where the words of normal numbers begin in a key's stream."""
GROWTH = 1.01


class APOLLOAdamW(MatrixOptimizer):
    """APOLLO and APOLLO-Mini (Zhu et al., arXiv 2412.05270), as apollo_torch.APOLLOAdamW.

    params           parameters or groups; float32, bfloat16 or float16, gradients likewise. A group with a `rank` holds
                     matrices and is projected; one without takes AdamW: eps before the bias correction, decay after
    lr               step length, >= 0
    betas            decay of the two moments, each in [0, 1)
    eps              added to the root of the second moment, before the bias correction
    weight_decay     decoupled, after the step: p shrinks by 1 - lr weight_decay
    scale_front      scale before the limiter, not after
    rank             columns of the projection, 1 to the shorter side (1 in APOLLO-Mini); None: no projection
    update_proj_gap  steps between two draws of the projection
    scale            enters as its root; 128 in APOLLO-Mini
    scale_type       "channel": a factor a channel; "tensor": one in all, as in APOLLO-Mini
    proj_type        "std": the shorter side is projected; "reverse_std", "left", "right"
    proj             "random"; no other projection is made
    limiter          the step grows by 1 % at most from one step to the next
    seed             of the projections, which also depend on the parameter's number and the period, and are not stored

    options          by keyword: codecs, of the moments ("dynamic8", or {"m": ..., "v": ...}), block, min_8bit_size,
                     overrides, maximize; max_grad_norm and gnorm_scale as for `Composed`

    State: `step`, `exp_avg` and `exp_avg_sq` of the projected gradient's shape, and the number `prev`; all float32.
    Nothing waits for the device. Products are in float32 and obey torch.backends.cuda.matmul.allow_tf32.

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
        scale_front: bool = False,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        scale_type: str = "channel",
        proj_type: str = "std",
        proj: str = "random",
        limiter: bool = True,
        seed: int = 0,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "scale_front": scale_front,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "scale_type": scale_type,
            "proj_type": proj_type,
            "proj": proj,
            "limiter": limiter,
            "seed": seed,
        }
        super().__init__(params, defaults, options)

    codable = GaLoreAdamW.codable
    first_number = 0
    """Of the parameters, which projections are drawn by."""

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["adamw"] if group["rank"] is None else RULES["apollo"]

    def _words(self, group: Mapping[str, Any]) -> Mapping[str, tuple[str, int | None]]:
        return ADAM if group["rank"] is None else WORDS | {"limiter": ("limiter", None)}

    def _check_group(self, group: Mapping[str, Any], call: str) -> None:
        if group["proj"] != "random":
            raise ValueError(
                f"{call}: proj must be 'random', got {group['proj']!r}; GaLoreAdamW finds singular vectors"
            )
        if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
            raise ValueError(f"{call}: seed must be a whole number, got {group['seed']!r}")

    def _layout(self, group: Mapping[str, Any], hyper: Mapping[str, Any], p: Tensor) -> states.Layout:
        shapes = self._rule(group).shapes(tuple(p.shape), dict(hyper))
        inner = self._inner(group, p, shapes["m"])
        prev = tuple((states.Part(name, shapes[name], torch.float32, 0.0),) for name in ("prev",) if name in shapes)
        return states.Layout(inner.codings, (*inner.parts, *prev))

    def _run(self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work]) -> None:
        every = (p for one in self.param_groups for p in one["params"])
        numbers = {id(p): k for k, p in enumerate(every, self.first_number)}
        for some in in_turn(work, self._rule(group), hyper):
            self._together(group, hyper, some, numbers)

    def _together(
        self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work], numbers: Mapping[int, int]
    ) -> None:
        """Step these; their projected gradients are held at the same time."""
        dense = "rank" not in hyper
        whole = []
        for w in work:
            R = w.gradient if dense else self._project(w, group, hyper, numbers[id(w.p)])
            whole.append(Projected(w, R, self._inner(group, w.p, tuple(R.shape))))
        for t in sorted({w.t for w in work}):
            some = [x for x in whole if x.work.t == t]
            for x, N in zip(some, adam(some, hyper), strict=True):
                if dense:
                    move(x.work, N, corrected(hyper, t), hyper)
                else:
                    _scaled(x, N, hyper)

    def _project(self, w: Work, group: Mapping[str, Any], hyper: Mapping[str, Any], number: int) -> Tensor:
        """R, by this period's projection; on a CPU, where normal numbers are dear, it is kept for the period."""
        left, period, rank = is_left(w.p, hyper), (w.t - 1) // int(hyper["gap"]) + 1, int(hyper["rank"])
        kept, mark = self.__dict__.setdefault("_projections", {}), (group["seed"], period, number, rank, left)
        P = kept[w.p][1] if w.p in kept and kept[w.p][0] == mark else None
        if P is None:
            word = key(step_word(group["seed"], period), number)
            P = normals(word, w.p.shape[0 if left else 1] * rank, w.p.device).div_(sqrt(rank)).float().view(-1, rank)
        if not w.p.is_cuda:
            kept[w.p] = mark, P
        return P.mT @ w.gradient if left else w.gradient @ P


class APOLLOAdamW8bit(APOLLOAdamW):
    """`APOLLOAdamW` whose moments are kept in 8 bits (dynamic maps, blocks of 256), but for projected gradients of
    fewer than 4,096 elements."""

    usual = "dynamic8"


def is_left(p: Tensor, hyper: Mapping[str, Any]) -> bool:
    """Whether the rows are projected; else the columns are."""
    if hyper["proj_type"] in ("left", "right"):
        return bool(hyper["proj_type"] == "left")
    return bool((p.shape[0] < p.shape[1]) == (hyper["proj_type"] == "std"))


def _scaled(x: Projected, N: Tensor, hyper: Mapping[str, Any]) -> None:
    """p <- (p - step S) (1 - lr wd); S is the gradient times a factor a channel, and is not made."""
    w, axis = x.work, 0 if is_left(x.work.p, hyper) else 1
    g, p, root = w.gradient, w.p.float(), sqrt(hyper["scale"])
    if hyper["scale_type"] == "tensor":
        f, size = (_norm(N) / (_norm(x.R) + 1e-8)).float(), _norm(g)
    else:
        f, size = (_norm(N, axis) / (_norm(x.R, axis) + 1e-8)).float(), _norm(g, axis)
    if hyper["limiter"]:
        front = root if hyper["scale_front"] else 1.0
        norm = _norm(f.double() * size) * front
        grown = torch.ones_like(norm)
        if w.t > 1:
            grown = (norm / (w.state["prev"].double() + 1e-8)).clamp(min=GROWTH) / GROWTH
        w.state["prev"].copy_(norm / grown)
        f = f / grown.float()
    p.addcmul_(g, f, value=-root * corrected(hyper, w.t)).mul_(1.0 - hyper["lr"] * hyper["wd"])
    if p is not w.p:
        w.p.copy_(p)


def _norm(x: Tensor, axis: int | None = None) -> Tensor:
    """The norm along an axis, which stays, or of all; float64."""
    return torch.linalg.vector_norm(x, dim=axis, keepdim=axis is not None, dtype=torch.float64)


def normals(word: int, count: int, device: torch.device) -> Tensor:
    """Standard normal numbers of a key's stream, float64, by Box and Muller's transform of pairs of words."""
    places = torch.arange(count + count % 2, dtype=torch.int64, device=device)
    upper = _shifted(_mixed(places + _signed(word + NORMALS)), 11).double()
    radius = ((upper[0::2] + 1.0) * 2.0**-53).log_().mul_(-2.0).sqrt_()
    angle = upper[1::2] * (2.0**-53 * 2.0 * pi)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1).view(-1)[:count]


def _mixed(z: Tensor) -> Tensor:
    """splitmix64 of words in int64, whose sums and products are modulo 2^64."""
    z = z + _signed(GOLDEN)
    z = (z ^ _shifted(z, 30)) * _signed(FIRST)
    z = (z ^ _shifted(z, 27)) * _signed(SECOND)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros from the left."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """The int64 of the same 64 bits."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word
