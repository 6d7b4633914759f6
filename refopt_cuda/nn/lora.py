"""A low-rank correction beside a frozen layer: y + s (x A') B', with A and B the only parameters that train."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refopt.spec import ShapeError
from refopt_cuda.nn.linear4bit import Linear4bit, decoded

__all__ = ["LoRALinear"]


class LoRALinear(nn.Module):
    """`base`, a Linear4bit or torch.nn.Linear, frozen, plus a correction of rank r (Hu et al., arXiv 2106.09685).

    r            1 to the smaller side of base
    alpha        the correction is multiplied by s = alpha / r, or alpha / sqrt(r) if `stabilized`
    dropout      of the correction's input, in training
    dtype        of `lora_A` (r, in) and `lora_B` (out, r) (default: that of base's weights before they were coded)

    B is zero at first: the layer begins as `base`. Products are taken in the dtype that `base` takes. Without dropout
    the correction is added into base's product, forward and backward, and nothing of the size of y is made for it.
    Raises ValueError for r, alpha or dropout out of range, TypeError for another base.
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int = 64,
        alpha: float = 16,
        dropout: float = 0.0,
        stabilized: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(f"LoRALinear: base must be a Linear4bit or torch.nn.Linear, got {type(base).__name__}")
        out, into = base.out_features, base.in_features
        if isinstance(r, bool) or not isinstance(r, int) or not 1 <= r <= min(out, into):
            raise ValueError(f"LoRALinear: r must be whole, 1 to {min(out, into)} for this base, got {r!r}")
        if not math.isfinite(alpha):
            raise ValueError(f"LoRALinear: alpha must be finite, got {alpha!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"LoRALinear: dropout must be >= 0 and < 1, got {dropout!r}")
        self.base: nn.Linear = base.requires_grad_(False)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.s = alpha / (math.sqrt(r) if stabilized else r)
        kind = dtype or (base.weight_dtype if isinstance(base, Linear4bit) else base.weight.dtype)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(r, into, dtype=kind, device=device))
        self.lora_B = nn.Parameter(torch.empty(out, r, dtype=kind, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A uniform within 1 / sqrt(in), B zero."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype that base gives."""
        if not isinstance(self.base, Linear4bit) or (self.training and self.dropout):
            y = self.base(x)
            inner = F.dropout(x, self.dropout, self.training).to(y.dtype)
            return y + self.s * F.linear(F.linear(inner, self.lora_A.to(y.dtype)), self.lora_B.to(y.dtype))
        dtype = self.base.dtype_for(x)
        bias = None if self.base.bias is None else self.base.bias.to(dtype)
        y = corrected(x.to(dtype), bias, self.lora_A.to(dtype), self.lora_B.to(dtype), self.base, self.s)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A torch.nn.Linear with W + s B A, summed in float32, rounded once to `dtype` (default: base's)."""
        base = self.base
        if isinstance(base, Linear4bit):
            w, kind = base.dequantize(torch.float32), base.weight_dtype
        else:
            w, kind = base.weight.float(), base.weight.dtype
        return with_weight(base, w + self.s * (self.lora_B.float() @ self.lora_A.float()), dtype or kind)

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}"


def with_weight(base: nn.Linear, w: Tensor, dtype: torch.dtype) -> nn.Linear:
    """A torch.nn.Linear like base, with weights w and its bias, in this dtype; takes no gradients."""
    if tuple(w.shape) != (base.out_features, base.in_features):
        raise ShapeError(f"with_weight: w must be ({base.out_features}, {base.in_features}), got {tuple(w.shape)}")
    made = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    made.weight = nn.Parameter(w.to(dtype), requires_grad=False)
    if base.bias is not None:
        made.bias = nn.Parameter(base.bias.detach().to(dtype), requires_grad=False)
    return made.train(base.training)


@torch.compiler.disable
def corrected(x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, base: Linear4bit, s: float) -> Tensor:
    """x W' + bias + s (x A') B', all of one dtype."""
    return _Corrected.apply(x, bias, A, B, base, s)


class _Corrected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, base: Linear4bit, s: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        with decoded(base, x) as W:
            y = F.linear(rows, W, bias)
        h = rows @ A.T
        y.addmm_(h, B.T, alpha=s)
        ctx.base, ctx.s = base, s
        ctx.save_for_backward(x, h, A, B)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, A, B = ctx.saved_tensors
        rows, dx = dy.reshape(-1, dy.shape[-1]), None
        dh = (rows @ B).mul_(ctx.s)
        if ctx.needs_input_grad[0]:
            with decoded(ctx.base, dy) as W:
                dx = rows @ W
            dx = dx.addmm_(dh, A).view(x.shape)
        db = rows.sum(0) if ctx.needs_input_grad[1] else None
        dB = (rows.T @ h).mul_(ctx.s)
        return dx, db, dh.T @ x.reshape(-1, x.shape[-1]), dB, None, None
