"""A linear layer whose weights are frozen in 4 bits: decoded for each use, forward and backward, never trained."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from refopt.spec import NonFiniteError, ShapeError, StateError
from refopt_cuda.codecs import FROZEN, named
from refopt_cuda.nn import scratch
from refopt_cuda.quantization import Quantized, dequantize, quantize

__all__ = ["Linear4bit"]

GROUP = 256
"""Scales of blocks that share one of their own."""
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
PREFIX = "quant_state.bitsandbytes__"
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
STATISTICS = ("absmax", "nested_absmax", "nested_offset")


class Linear4bit(nn.Linear):
    """`torch.nn.Linear` with frozen weights in NF4 or FP4; in place of `bitsandbytes.nn.Linear4bit`.

    in_features          of x
    out_features, bias   as in torch.nn.Linear; the bias is not coded
    compute_dtype        float32, bfloat16 or float16 that products are taken in (default: the input's; autocast's own)
    compress_statistics  double quantization: the scales are coded too, 4.127 bits a weight instead of 4.5
    quant_type           "nf4" or "fp4"
    block                weights that share a scale
    device, dtype        of the bias, and of the weights before they are coded

    `weight` is (n / 2, 1) uint8: two codes a byte of the flattened (out, in) matrix, and takes no gradient. Statistics
    are buffers that no `.to(dtype)` converts. The state dict is bitsandbytes' (`weight.absmax`, `weight.quant_map`,
    `weight.quant_state.bitsandbytes__nf4`, ...); loading one with plain (out, in) weights codes them.

    Raises ValueError for an unknown quant_type or block, TypeError for dtypes; `store` NonFiniteError for NaN or Inf.
    """

    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        block: int = 64,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        _check(quant_type, block, compute_dtype, dtype)
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype, self.weight_dtype = compute_dtype, dtype
        self.quant_type, self.compress_statistics, self.block = quant_type, compress_statistics, block
        n = in_features * out_features
        count = -(-n // block)
        self.weight = nn.Parameter(torch.empty(-(-n // 2), 1, dtype=torch.uint8, device=device), requires_grad=False)
        kind = torch.uint8 if compress_statistics else torch.float32
        shapes = {"absmax": (count,), "nested_absmax": (-(-count // GROUP),), "nested_offset": (1,)}
        for name, shape in shapes.items() if compress_statistics else [("absmax", (count,))]:
            part = torch.empty(shape, dtype=kind if name == "absmax" else torch.float32, device=device)
            self.register_buffer(name, part, persistent=False)
        for name in STATISTICS[1:] if not compress_statistics else ():
            self.register_buffer(name, None, persistent=False)
        made = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", made)
        if self.weight.device.type != "meta":
            self.reset_parameters()

    @classmethod
    def of(cls, linear: nn.Linear, device: Any = None, **options: Any) -> Linear4bit:
        """The same layer with its weights coded, on `device` (default: where they are); the bias keeps its dtype."""
        w = linear.weight
        made = cls(linear.in_features, linear.out_features, False, device="meta", dtype=w.dtype, **options)
        made.store(w.detach() if device is None else w.detach().to(device))
        if linear.bias is not None:
            trained = linear.bias.requires_grad
            made.bias = nn.Parameter(linear.bias.detach().to(made.weight.device), requires_grad=trained)
        return made.train(linear.training)

    def reset_parameters(self) -> None:
        """Draw weights as torch.nn.Linear does, and code them."""
        w = torch.empty(self.out_features, self.in_features, dtype=self.weight_dtype, device=self.weight.device)
        nn.init.kaiming_uniform_(w, a=math.sqrt(5))
        self.store(w)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def codec(self) -> str:
        """The name of the form for `refopt_cuda.quantize`."""
        if self.compress_statistics:
            return "double" if self.quant_type == "nf4" else "double.fp4"
        return self.quant_type

    @property
    def quantized(self) -> Quantized:
        """The weights as `refopt_cuda.dequantize` takes them; shares memory."""
        kept: dict[str, Any] = {"codes": self.weight.detach().view(-1), "scales": self.absmax}
        if self.nested_absmax is not None:
            kept |= {"scales2": self.nested_absmax, "offset": self.nested_offset}
        shape = (self.out_features, self.in_features)
        return Quantized(self.codec, shape, NAMES[self.weight_dtype], self.block, kept)

    @torch.no_grad()
    def store(self, w: Tensor) -> None:
        """Code (out, in) weights, float32, bfloat16 or float16, and move this layer's weights to their device."""
        shape = (self.out_features, self.in_features)
        if tuple(w.shape) != shape:
            raise ShapeError(f"Linear4bit.store: w must be of shape {shape}, got {tuple(w.shape)}")
        if w.dtype not in NAMES:
            raise TypeError(f"Linear4bit.store: w must be float32, bfloat16 or float16, got {w.dtype}")
        q = quantize(w.contiguous(), self.codec, block=self.block)
        scales = q.arrays["offset"] if self.compress_statistics else q.scales
        if not bool(torch.isfinite(scales).all()):
            raise NonFiniteError(f"Linear4bit.store: w of shape {shape} holds NaN or Inf")
        self.weight = nn.Parameter(q.codes.view(-1, 1), requires_grad=False)
        self.absmax, self.weight_dtype = q.scales, w.dtype
        if self.compress_statistics:
            self.nested_absmax, self.nested_offset = q.arrays["scales2"], q.arrays["offset"]

    def dequantize(self, dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        """The (out, in) weights, rounded once to `dtype` (default: what they were before they were coded)."""
        name = NAMES[out.dtype if out is not None else dtype or self.weight_dtype]
        return dequantize(self.quantized, name, out)

    def dtype_for(self, x: Tensor) -> torch.dtype:
        """What products with x are taken in."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return self.compute_dtype or x.dtype

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of x, or in autocast's."""
        dtype = self.dtype_for(x)
        y = multiply(x.to(dtype), None if self.bias is None else self.bias.to(dtype), self)
        return y if torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.codec}, block={self.block}"

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        """Statistics follow the device, and keep their dtype."""
        kept = {name: getattr(self, name) for name in STATISTICS}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            if old is not None and getattr(self, name).dtype != old.dtype:
                setattr(self, name, old.to(getattr(self, name).device))
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, value in self.statistics().items():
            destination[f"{prefix}weight.{name}"] = value

    def statistics(self) -> dict[str, Tensor]:
        """What stands beside `weight` in a state dict, by bitsandbytes' names."""
        told: dict[str, Any] = {"quant_type": self.quant_type, "blocksize": self.block}
        told |= {"dtype": NAMES[self.weight_dtype], "shape": [self.out_features, self.in_features]}
        out = {"absmax": self.absmax, "quant_map": _table(self.quant_type, self.absmax.device)}
        if self.nested_absmax is not None and self.nested_offset is not None:
            out |= {"nested_absmax": self.nested_absmax, "nested_quant_map": _table("dynamic8", self.absmax.device)}
            told |= {"nested_blocksize": GROUP, "nested_dtype": "float32"}
            offset = self.nested_offset
            told["nested_offset"] = float("nan") if offset.device.type == "meta" else offset.item()
        words = list(json.dumps(told).encode())
        return out | {PREFIX + self.quant_type: torch.tensor(words, dtype=torch.uint8)}

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        missing, errors = args[2], args[4]
        given = {k[len(prefix) + 7 :]: v for k, v in state.items() if k.startswith(f"{prefix}weight.")}
        w = state.get(f"{prefix}weight")
        try:
            if w is None:
                missing.append(f"{prefix}weight")
            elif given:
                self.take(w, given)
            else:
                self.store(w.to(self.weight.device) if self.weight.device.type != "meta" else w)
        except (ValueError, TypeError, RuntimeError) as error:
            errors.append(f"{prefix}weight: {error}")
        if self.bias is not None and f"{prefix}bias" in state:
            bias = state[f"{prefix}bias"].to(self.weight.device)
            self.bias = nn.Parameter(bias, requires_grad=self.bias.requires_grad)
        elif self.bias is not None:
            missing.append(f"{prefix}bias")
        for name in [f"{prefix}weight.{k}" for k in given]:
            state.pop(name)

    @torch.no_grad()
    def take(self, w: Tensor, statistics: dict[str, Tensor]) -> None:
        """Codes and statistics as a checkpoint holds them, by bitsandbytes' names, without `weight.`.

        Raises StateError where they are of another shape, or of tables that are not the published ones."""
        packed = [k for k in statistics if k.startswith(PREFIX)]
        if len(packed) != 1 or packed[0].removeprefix(PREFIX) not in FROZEN:
            raise StateError(f"Linear4bit: one key {PREFIX}nf4 or ...fp4 is needed, got {sorted(statistics)}")
        told = json.loads(bytes(statistics[packed[0]].cpu().numpy()))
        if list(told["shape"]) != [self.out_features, self.in_features]:
            raise StateError(
                f"Linear4bit: the checkpoint holds {told['shape']}, this layer {[self.out_features, self.in_features]}"
            )
        nested = "nested_absmax" in statistics
        kind, block = told["quant_type"], told["blocksize"]
        _check(kind, block, None, torch.float32)
        if nested and told["nested_blocksize"] != GROUP:
            raise StateError(f"Linear4bit: nested_blocksize must be {GROUP}, got {told['nested_blocksize']}")
        for name, stem in (("quant_map", kind), ("nested_quant_map", "dynamic8")):
            if name in statistics and not _same(statistics[name], stem):
                raise StateError(f"Linear4bit: {name} is not the table of {stem}")
        device = self.weight.device if self.weight.device.type != "meta" else w.device
        self.quant_type, self.block, self.compress_statistics = kind, block, nested
        self.weight_dtype = getattr(torch, told["dtype"])
        self.weight = nn.Parameter(w.view(torch.uint8).reshape(-1, 1).to(device), requires_grad=False)
        self.absmax = statistics["absmax"].to(device)
        self.nested_absmax = statistics["nested_absmax"].to(device) if nested else None
        self.nested_offset = torch.tensor([told["nested_offset"]], device=device) if nested else None


def _check(quant_type: str, block: int, compute: torch.dtype | None, dtype: torch.dtype) -> None:
    if quant_type not in FROZEN:
        raise ValueError(f"Linear4bit: quant_type must be {' or '.join(map(repr, FROZEN))}, got {quant_type!r}")
    if block not in BLOCKS:
        raise ValueError(f"Linear4bit: block must be one of {', '.join(map(str, BLOCKS))}, got {block!r}")
    for name, value in (("compute_dtype", compute), ("dtype", dtype)):
        if value is not None and value not in NAMES:
            raise TypeError(f"Linear4bit: {name} must be float32, bfloat16 or float16, got {value}")


def _table(stem: str, device: torch.device) -> Tensor:
    """A codec's values by code, float32."""
    form = named(stem)
    return torch.tensor(form.module.tables(**form.options)[0], device=device)


def _same(table: Tensor, stem: str) -> bool:
    """Whether a checkpoint's table is the codec's, within two units in the last place: bitsandbytes computes the
    dynamic map in float32, and 72 of its values are a unit off."""
    ours = _table(stem, torch.device("cpu"))
    return table.shape == ours.shape and torch.allclose(table.float().cpu(), ours, rtol=2**-22, atol=0)


@torch.compiler.disable
def multiply(x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
    """x W' + bias, all of one dtype; the gradient of x decodes W again."""
    return _Multiply.apply(x, bias, layer)


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        with decoded(layer, x) as W:
            return F.linear(x, W, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        dx = db = None
        if ctx.needs_input_grad[0]:
            with decoded(ctx.layer, dy) as W:
                dx = dy @ W
        if ctx.needs_input_grad[1]:
            db = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, db, None


@contextmanager
def decoded(layer: Linear4bit, x: Tensor) -> Iterator[Tensor]:
    """The layer's weights in the dtype of x, in the scratch of its device; what reads them is enqueued inside."""
    if layer.weight.device != x.device:
        raise ValueError(f"Linear4bit: x is on {x.device}, the weights on {layer.weight.device}")
    with scratch.view((layer.out_features, layer.in_features), x.dtype, x.device) as W:
        layer.dequantize(out=W)
        yield W
