"""`GaLoreAdamW` and `GaLoreAdamW8bit`: Adam on the strongest directions of each gradient, with galore_torch's words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod, sqrt
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from refopt.memory.scratch import MOST
from refopt.rules import RULES
from refopt.spec import Rule, State
from refopt_cuda import rules
from refopt_cuda.kernels import step_cuda, step_host
from refopt_cuda.optim import settings, states
from refopt_cuda.optim.coded import decoded, store, together
from refopt_cuda.optim.matrix import MatrixOptimizer, Work
from refopt_cuda.optim.run import words as memory
from refopt_cuda.scalars import ipow

MOMENTS = tuple(s for s in RULES["adamw"].states if s.name in ("m", "v"))
INNER = rules.form_of("adam", {"eps_at": "uncorrected"})
"""The rule's kernel for moments that are coded."""
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

    options          by keyword: codecs, of the moments ("dynamic8", or {"m": ..., "v": ...}), block, min_8bit_size,
                     overrides, maximize; max_grad_norm and gnorm_scale as for `Composed`

    State: `step`, `exp_avg` and `exp_avg_sq` (or their codes and scales) of the projected gradient's shape, `P` (rows x
    rank) and `Q` (columns x rank) as far as they are used, float32. Moments stay when directions change. Directions are
    singular vectors in float64, the largest entry of each positive; of the shorter side they are found by its Gram
    matrix. Looking for them waits for the device; other steps do not. Products are in float32 and obey
    torch.backends.cuda.matmul.allow_tf32. torch.amp.GradScaler unscales and skips as it does for any optimizer.

    Raises TypeError, ValueError or ShapeError that name the argument, and StateError for a state that was altered;
    nothing is changed then.
    """

    codable: ClassVar[Mapping[str, State]] = {s.name: s for s in MOMENTS}

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
        **options: Any,
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
        super().__init__(params, defaults, options)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["adamw"] if group["rank"] is None else RULES["galore"]

    def _words(self, group: Mapping[str, Any]) -> Mapping[str, tuple[str, int | None]]:
        return ADAM if group["rank"] is None else ADAM | PROJECTED

    def _layout(self, group: Mapping[str, Any], hyper: Mapping[str, Any], p: Tensor) -> states.Layout:
        shapes = self._rule(group).shapes(tuple(p.shape), dict(hyper))
        inner = self._inner(group, p, shapes["m"])
        bases = tuple((states.Part(name, shapes[name], torch.float32, 0.0),) for name in ("P", "Q") if name in shapes)
        return states.Layout(inner.codings, bases + inner.parts)

    def _run(self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work]) -> None:
        for some in in_turn(work, self._rule(group), hyper):
            self._together(group, hyper, some)

    def _together(self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work]) -> None:
        """Step these; their projected gradients are held at the same time."""
        whole = []
        for w in work:
            R = (_projected(w, hyper) if "rank" in hyper else w.gradient).contiguous()
            whole.append(Projected(w, R, self._inner(group, w.p, tuple(R.shape))))
        kinds: dict[Any, list[Projected]] = {}
        for x in whole:
            kinds.setdefault((x.work.t, x.R.device, x.kept.codings), []).append(x)
        for (t, _, codings), some in kinds.items():
            fused = all(coding.form.scaled for coding in codings)
            moved = self._fused(some, hyper, codings) if fused else adam(some, hyper)
            for x, N in zip(some, moved, strict=True):
                move(x.work, N, -hyper["lr"] if fused else corrected(hyper, t), hyper)

    def _fused(
        self, some: list[Projected], hyper: Mapping[str, Any], codings: Sequence[settings.Coding]
    ) -> list[Tensor]:
        """Adam's step of length 1 from zero, by the kernels of coded states."""
        zeros, t = [torch.zeros_like(x.R) for x in some], some[0].work.t
        row = rules.row("adam", t, {**hyper, "lr": 1.0, "wd": 0.0})
        forms, blocks = [c.form for c in codings], [c.block for c in codings]
        kept = [x.moments for x in some]
        if not zeros[0].is_cuda:
            for p, x, tensors in zip(zeros, some, kept, strict=True):
                arrays = [{"codes": memory(codes), "scales": memory(scales)} for codes, scales in tensors]
                step_host.step(INNER, forms, p.numpy(), x.R.numpy(), arrays, tuple(p.shape), tuple(blocks), row)
            return zeros
        with torch.cuda.device(zeros[0].device):
            stream = torch.cuda.current_stream(zeros[0].device).cuda_stream
            launches = self.__dict__.setdefault("_launches", {})
            key = zeros[0].device, tuple(codings)
            if key not in launches:
                launches[key] = step_cuda.Launch(INNER, forms, "float32", "float32", blocks)
            for k in range(0, len(some), step_cuda.SIZES[-1]):
                _launch(launches[key], zeros[k:], some[k : k + step_cuda.SIZES[-1]], kept[k:], row, stream)
        return zeros


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with moments of 8 bits: dynamic maps, blocks of 256, as bitsandbytes has them.

    min_8bit_size   projected gradients (whole ones, in a group without `rank`) of fewer elements, vectors below 65,536
                    and rows below 16 keep float32 moments

    The state has `m.codes`, `m.scales`, `v.codes` and `v.scales` in place of `exp_avg` and `exp_avg_sq`; P and Q stay
    float32. CUDA tensors need CuPy.
    """

    usual = "dynamic8"


def _launch(
    launch: step_cuda.Launch, zeros: Sequence[Tensor], some: Sequence[Projected], kept: Any, row: Any, stream: int
) -> None:
    """One launch of the kernel of coded states; the table of tensors is new, as `zeros` are."""
    with step_cuda.on_stream(stream):
        launch.bind(
            [
                step_cuda.Tensor(p.data_ptr(), tuple((c.data_ptr(), s.data_ptr()) for c, s in tensors), tuple(p.shape))
                for p, tensors, _ in zip(zeros, kept, some, strict=False)
            ]
        )
    launch.run([x.R.data_ptr() for x in some], row[None], None, stream)


def corrected(hyper: Mapping[str, Any], t: int) -> float:
    """lr with the bias corrections."""
    return hyper["lr"] * sqrt(1.0 - ipow(hyper["beta2"], t)) / (1.0 - ipow(hyper["beta1"], t))


class Projected(NamedTuple):
    """One parameter and its gradient on the directions kept, float32, row-major."""

    work: Work
    R: Tensor
    kept: states.Layout

    @property
    def moments(self) -> list[list[Tensor]]:
        """The tensors that each moment is kept in."""
        return [[self.work.state[part.key] for part in parts] for parts in self.kept.parts]


def in_turn(work: list[Work], rule: Rule, hyper: Mapping[str, Any]) -> Iterator[list[Work]]:
    """Matrices whose projected gradients are held together."""

    def held(w: Work) -> int:
        return prod(rule.shapes(tuple(w.p.shape), dict(hyper))["m"])

    return together(work, lambda some: sum(map(held, some)) > MOST)


def _projected(w: Work, hyper: Mapping[str, Any]) -> Tensor:
    """R, on new directions where the period begins."""
    P, Q, g = w.state.get("P"), w.state.get("Q"), w.gradient
    if (w.t - 1) % int(hyper["gap"]) == 0:
        if P is not None:
            P.copy_(basis(g, int(hyper["rank"])))
        if Q is not None:
            Q.copy_(basis(g.mT, int(hyper["rank"])))
    if P is not None and Q is not None:  # in float64: off the diagonal of new directions R is 0, and Adam divides by it
        return (P.double().mT @ g.double() @ Q.double()).float()
    return P.mT @ g if P is not None else g @ Q  # type: ignore[operator]


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


def adam(some: list[Projected], hyper: Mapping[str, Any]) -> list[Tensor]:
    """The moments' new values, and N = m / (sqrt(v) + eps)."""
    kept = [[*zip(x.kept.codings, x.moments, strict=True)] for x in some]
    m, v = ([decoded(*one[k], tuple(x.R.shape)) for one, x in zip(kept, some, strict=True)] for k in (0, 1))
    R, beta1, beta2 = [x.R for x in some], hyper["beta1"], hyper["beta2"]
    torch._foreach_mul_(m, beta1)
    torch._foreach_add_(m, R, alpha=1.0 - beta1)
    torch._foreach_mul_(v, beta2)
    torch._foreach_addcmul_(v, R, R, value=1.0 - beta2)
    below = torch._foreach_sqrt(v)
    torch._foreach_add_(below, hyper["eps"])
    for one, *values in zip(kept, m, v, strict=True):
        for (coding, tensors), value in zip(one, values, strict=True):
            store(coding, tensors, value)
    return list(torch._foreach_div(m, below))


def move(w: Work, N: Tensor, step: float, hyper: Mapping[str, Any]) -> None:
    """p <- (p - step scale P N Q^T) (1 - lr wd), in one product where there is one."""
    keep = 1.0 - hyper["lr"] * hyper["wd"]
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
