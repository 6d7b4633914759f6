"""A decoder-only transformer over bytes: RMSNorm, rotary positions, SwiGLU, output weights tied to the embedding."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 256


@dataclass(frozen=True)
class Sizes:
    """Layers, width, heads, hidden width of the feed-forward part and bytes of context.

    Raises ValueError, in one sentence, for sizes that make no transformer.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    context: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads, got width {self.width} and heads {self.heads}")
        if (self.width // self.heads) % 2:
            raise ValueError(f"width / heads must be even for rotary positions, got {self.width // self.heads}")

    def parameters(self) -> int:
        """Exact number of weights."""
        layer = 4 * self.width**2 + 3 * self.width * self.hidden + 2 * self.width
        return self.layers * layer + self.width + VOCABULARY * self.width


def rotation(context: int, size: int, base: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [context, size / 2]: position t turns pair i by t base^(-2i / size)."""
    speed = base ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    angle = torch.outer(torch.arange(context, dtype=torch.float64), speed)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head against each other; x is [batch, heads, time, size]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), 1e-6).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.heads = s.heads
        self.qkv = nn.Linear(s.width, 3 * s.width, bias=False)
        self.out = nn.Linear(s.width, s.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, width = x.shape
        q, k, v = self.qkv(x).view(batch, time, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class SwiGLU(nn.Module):
    """(silu(x W_gate) * x W_up) W_down."""

    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.gate_up = nn.Linear(s.width, 2 * s.hidden, bias=False)
        self.down = nn.Linear(s.hidden, s.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    def __init__(self, s: Sizes) -> None:
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(s.width), Attention(s)
        self.forward_norm, self.feed_forward = RMSNorm(s.width), SwiGLU(s)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.feed_forward(self.forward_norm(x))


class Transformer(nn.Module):
    """Bytes [batch, time] (int64) to logits [batch, time, 256] of the byte that follows each."""

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.embedding = nn.Embedding(VOCABULARY, sizes.width)
        self.blocks = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.norm = RMSNorm(sizes.width)
        self.output = nn.Linear(sizes.width, VOCABULARY, bias=False)
        cos, sin = rotation(sizes.context, sizes.width // sizes.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._start()
        self.output.weight = self.embedding.weight

    def _start(self) -> None:
        """Normal weights of 0.02 (of the width for the tables); what ends a residual branch is smaller by its depth."""
        for name, p in self.named_parameters():
            if p.ndim == 2:
                depth = (2 * self.sizes.layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(p, std=depth * (0.02 if p.shape[0] == VOCABULARY else p.shape[1] ** -0.5))

    def forward(self, x: Tensor) -> Tensor:
        time = x.shape[1]
        h = self.embedding(x)
        cos, sin = self.cos[:time], self.sin[:time]
        for block in self.blocks:
            h = block(h, cos, sin)
        return self.output(self.norm(h))

    def loss(self, x: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        """Cross entropy in nats of the bytes y that follow x."""
        logits = self(x).float()
        return F.cross_entropy(logits.view(-1, VOCABULARY), y.reshape(-1), reduction=reduction)


def build(sizes: Sizes, seed: int, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> Transformer:
    """The same weights for the same seed on every device: they are drawn in float32 on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Transformer(sizes)
    model = model.to(device)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model
