"""`Muon`: torch.optim.Muon's arguments; equal matrices go through their Newton-Schulz steps together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from refopt.memory.scratch import ROOM
from refopt.rules import RULES
from refopt.spec import Rule, State
from refopt_cuda.kernels import muon as kernels
from refopt_cuda.kernels import rows_cuda
from refopt_cuda.optim import dialect, live, newton_schulz, states
from refopt_cuda.optim.checks import NUMBERS
from refopt_cuda.optim.matrix import MatrixOptimizer, Now, Work, alike

DTYPES = {name: dtype for dtype, name in NUMBERS.items()}
WORDS: dict[str, tuple[str, int | None]] = {
    "lr": ("lr", None),
    "momentum": ("momentum", None),
    "nesterov": ("nesterov", None),
    "ns_steps": ("ns_steps", None),
    "eps": ("eps", None),
    "wd": ("weight_decay", None),
}


class Muon(MatrixOptimizer):
    """Muon (Jordan 2024; Liu et al., arXiv 2502.16982) over torch matrices: momentum, made orthogonal.

    params           matrices or parameter groups; float32, bfloat16 or float16, gradients likewise. Embeddings, output
                     heads and vectors usually take AdamW; a convolution's weight is flattened to (out, -1)
    lr               step length, >= 0
    weight_decay     decoupled: p shrinks by 1 - lr weight_decay
    momentum         share of the momentum kept, [0, 1)
    nesterov         make (1 - momentum) g + momentum B orthogonal, not B
    ns_coefficients  a, b, c of the polynomial a x + b x^3 + c x^5
    eps              least norm that counts
    ns_steps         Newton-Schulz steps, 0 to 99
    adjust_lr_fn     "original" (or None): lr sqrt(max(1, rows / columns)); "match_rms_adamw": 0.2 lr sqrt(max(rows,
                     columns))
    ns_dtype         number format of the products: by default "float16" on CUDA, "float32" on a CPU. "float16" is
                     scaled, and leaves the direction of float64 by 2e-3 to 5e-3 of its length where "bfloat16", which
                     torch.optim.Muon takes, leaves it by 1e-2 to 2e-2; both by ten times as much where a few directions
                     are strong and the rest is nearly nothing. "float32" obeys torch.backends.cuda.matmul.allow_tf32
    momentum_dtype   "float32", or "bfloat16": half the memory, rounded in each step
    options          by keyword: codecs, of the momentum ("dynamic8", or {"B": ...}), block, min_8bit_size, overrides,
                     maximize, max_grad_norm, gnorm_scale and capturable as for `Composed`

    State: `momentum_buffer`, row-major, torch's key, or "B.codes" and "B.scales"; and `step`. The momentum has the bits
    of `refopt.rules.muon`; the direction is within the above. Matrices of one shape are stepped together, with up to
    1 GiB beside them (or what one matrix takes), which is free again after the step; nothing waits for the device. CUDA
    tensors need CuPy.

    Raises TypeError, ValueError or ShapeError that name the argument, and StateError for a state that was altered;
    nothing is changed then.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        ns_dtype: str | None = None,
        momentum_dtype: str = "float32",
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "ns_dtype": ns_dtype,
            "momentum_dtype": momentum_dtype,
        }
        super().__init__(params, defaults, options)

    takes = dialect.LIVE
    codable: ClassVar[Mapping[str, State]] = {s.name: s for s in RULES["muon"].states}

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["muon"]

    def _words(self, group: Mapping[str, Any]) -> Mapping[str, tuple[str, int | None]]:
        return WORDS

    def _check_group(self, group: Mapping[str, Any], call: str) -> None:
        chosen = group["ns_coefficients"]
        if not isinstance(chosen, tuple | list) or len(chosen) != 3 or not all(_finite(c) for c in chosen):
            raise ValueError(f"{call}: ns_coefficients must be three finite numbers, got {chosen!r}")
        for key, choices in (
            ("adjust_lr_fn", (None, "original", "match_rms_adamw")),
            ("ns_dtype", (None, *DTYPES)),
            ("momentum_dtype", ("float32", "bfloat16")),
        ):
            if group[key] not in choices:
                raise ValueError(f"{call}: {key} must be one of {', '.join(map(repr, choices))}, got {group[key]!r}")
        if group["momentum_dtype"] != "float32" and group["codecs"]["B"] != "f32":
            both = f"momentum_dtype={group['momentum_dtype']!r}", f"codecs['B'] = {group['codecs']['B']!r}"
            raise ValueError(f"{call}: {' and '.join(both)} say it twice; leave momentum_dtype out")

    def _layout(self, group: Mapping[str, Any], hyper: Mapping[str, Any], p: torch.Tensor) -> states.Layout:
        if group["momentum_dtype"] == "float32":
            return self._inner(group, p, tuple(p.shape))
        part = states.Part("momentum_buffer", tuple(p.shape), DTYPES[group["momentum_dtype"]], 0.0)
        return states.Layout((), ((part,),))

    def _run(self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work]) -> None:
        for some in alike(work):
            dtype = DTYPES[group["ns_dtype"] or ("float16" if some[0].p.is_cuda else "float32")]
            kept = some[0].kept
            scaled = any(coding.form.scaled for coding in kept.codings)
            most = _together(some[0].p, dtype, hyper["ns_steps"], 4 * scaled)
            chunks = -(-len(some) // most)
            cuts = [len(some) * k // chunks for k in range(chunks + 1)]
            step = self._on_cuda if some[0].p.is_cuda else _on_cpu
            for low, high in zip(cuts, cuts[1:], strict=False):
                taken = some[low:high]
                if not scaled:
                    step(taken, hyper, group, dtype)
                    continue
                coded = [(kept.codings[0], [w.state[part.key] for part in kept.all], tuple(w.p.shape)) for w in taken]
                room = self._room_for(group, coded if taken[0].p.is_cuda else ())
                momenta = [room.decoded(*one) for one in coded]
                open_ = [w._replace(state={"momentum_buffer": B}) for w, B in zip(taken, momenta, strict=True)]
                step(open_, hyper, group, dtype)
                for w, (coding, tensors, _), B in zip(taken, coded, momenta, strict=True):
                    room.store(coding, tensors, B, w.now.skip)

    def _on_cuda(
        self, work: Sequence[Work], hyper: Mapping[str, Any], group: Mapping[str, Any], dtype: torch.dtype
    ) -> None:
        """Two passes that fill the stack, the products, one pass that steps; all on torch's current stream."""
        first = work[0].p
        dense = [w.p.contiguous() for w in work]
        grads = [w.g.contiguous() for w in work]
        buffers = [w.state["momentum_buffer"] for w in work]
        g, b, p = (NUMBERS[x.dtype] for x in (grads[0], buffers[0], first))
        kernel = kernels.Kernel(g, b, p, NUMBERS[dtype], newton_schulz.UNITS[dtype], bool(hyper["nesterov"]))
        addresses = [kernels.Matrix(*(x.data_ptr() for x in row)) for row in zip(grads, buffers, dense, strict=True)]
        with torch.cuda.device(first.device):
            stream = torch.cuda.current_stream(first.device).cuda_stream
            sums = torch.empty(len(work) * kernels.parts(first.numel()), dtype=torch.float64, device=first.device)
            row = self._row(work[0], hyper, group)
            passes = kernels.Passes(kernel, addresses, first.numel(), row, hyper["eps"], sums.data_ptr())
            stack = torch.empty((len(work), *first.shape), dtype=dtype, device=first.device)
            passes.run("momentum", stack.data_ptr(), stream)
            passes.run("input", stack.data_ptr(), stream)
            X = _directions(stack, hyper, group).contiguous()
            passes.run("apply", X.data_ptr(), stream)
        for w, stepped in zip(work, dense, strict=True):
            if stepped is not w.p:
                w.p.copy_(stepped)

    def _row(self, w: Work, hyper: Mapping[str, Any], group: Mapping[str, Any]) -> Any:
        """The scalars of a step, or where the device has computed them."""
        if w.now.scaling is None:
            return _scalars(w.p.shape, hyper, group, w.now)
        rooms = self._rooms.setdefault((id(group), tuple(w.p.shape)), {})
        more = {**hyper, "factor": _factor(w.p.shape, group)}
        return live.rows(rows_cuda.MUON, more, group, [1], w.now.scaling, w.p.device, rooms).address


def _finite(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and bool(np.isfinite(x))


def _together(p: torch.Tensor, dtype: torch.dtype, steps: int, beside: int = 0) -> int:
    """Matrices of this shape that fit into the room beside the weights; `beside`: further bytes an entry."""
    m, n = sorted(p.shape)
    way = newton_schulz.way(m, n, dtype, steps)
    each = p.numel() * (dtype.itemsize + beside) + newton_schulz.extra(m, n, dtype, way)
    return max(1, min(ROOM // each, kernels.MATRICES))


def _factor(shape: Sequence[int], group: Mapping[str, Any]) -> float:
    """What lr is multiplied by for a matrix of this shape."""
    m, n = shape
    return 0.2 * max(m, n) ** 0.5 if group["adjust_lr_fn"] == "match_rms_adamw" else max(1.0, m / n) ** 0.5


def _scalars(shape: Sequence[int], hyper: Mapping[str, Any], group: Mapping[str, Any], now: Now) -> np.ndarray:
    """mu, 1 - mu, decay, step, gs: in float64, rounded once."""
    mu, lr = hyper["momentum"], now.lr
    return np.array([mu, 1.0 - mu, 1.0 - lr * hyper["wd"], lr * _factor(shape, group), now.gs], np.float32)


def _directions(stack: torch.Tensor, hyper: Mapping[str, Any], group: Mapping[str, Any]) -> torch.Tensor:
    """The stack, made orthogonal with the shorter side first."""
    tall = stack.shape[1] > stack.shape[2]
    X = stack.mT if tall else stack
    X = newton_schulz.orthogonal(X, tuple(group["ns_coefficients"]), int(hyper["ns_steps"]))
    return X.mT if tall else X


def _on_cpu(work: Sequence[Work], hyper: Mapping[str, Any], group: Mapping[str, Any], dtype: torch.dtype) -> None:
    """The oracle's order of operations, a product or a sum at a time."""
    mu, rest, decay, step, _ = map(float, _scalars(work[0].p.shape, hyper, group, work[0].now))
    unit, inputs = newton_schulz.UNITS[dtype], []
    for w in work:
        g, B = w.gradient, w.state["momentum_buffer"]
        B.copy_((B.float() * mu).add_(g * rest))
        Z = (g * rest).add_(B.float() * mu) if hyper["nesterov"] else B.float()
        norm = torch.linalg.vector_norm(Z, dtype=torch.float64).clamp(min=hyper["eps"])
        inputs.append((Z * (unit / norm)).to(dtype))
    for w, X in zip(work, _directions(torch.stack(inputs), hyper, group), strict=True):
        p = w.p.float() * decay
        w.p.copy_(p.sub_((X.float() * (1 / unit)).mul_(step)))


class Muon8bit(Muon):
    """`Muon` whose momentum is kept in 8 bits (dynamic map, blocks of 256); smaller matrices keep a float32 one."""

    usual = "dynamic8"
