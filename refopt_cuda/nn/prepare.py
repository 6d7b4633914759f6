"""Swap the linear layers of a model in place: into 4 bits, with adapters, and back to plain weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from refopt.spec import StateError
from refopt_cuda.nn.linear4bit import PREFIX, Linear4bit
from refopt_cuda.nn.lora import LoRALinear, with_weight

__all__ = ["SKIP", "adapt", "merge", "prepare"]

SKIP = ("*lm_head", "*embed*", "*output_layer", "*score", "*classifier", "*pooler*", "*router", "*.gate")
"""Names of linear layers that stay as they are: heads, embeddings, routers of experts."""
Report = Callable[[str, int, int], None]
"""Called with (name, how many are done, how many there are)."""


def prepare(
    model: nn.Module,
    *,
    quant_type: str = "nf4",
    compress_statistics: bool = True,
    block: int = 64,
    compute_dtype: torch.dtype | None = None,
    skip: Iterable[str] = SKIP,
    device: Any = None,
    dtype: torch.dtype | None = None,
    weights: Callable[[str], Tensor | None] | None = None,
    progress: bool | Report = False,
) -> nn.Module:
    """Freeze a model with its linear layers as `Linear4bit`, in place; returns it.

    skip      patterns (fnmatch) of full names that stay plain; the output head of a transformers model always does
    device    where it shall be; layers move one at a time, so that no more than one is there uncoded
    dtype     what the plain rest is converted to (default: as it is)
    weights   name -> tensor, or None where there is none, for a model on the meta device: asked once for each, in
              order, and a weight is coded before the next is asked for. A checkpoint's own codes (`NAME.absmax` and so
              on) are taken as they are
    progress  True draws a bar; a function is called with (name, done, of)

    transformers' Conv1D (GPT-2) becomes a Linear4bit of the transposed weights. Raises ValueError where no layer is
    left to swap or options are out of range, StateError where `weights` lacks one.
    """
    options = {"quant_type": quant_type, "compress_statistics": compress_statistics, "block": block}
    options |= {"compute_dtype": compute_dtype}
    Linear4bit(1, 1, device="meta", **options)  # type: ignore[arg-type]
    plain = {*_heads(model)}
    names = [n for n, m in model.named_modules() if _linear(m) and m not in plain and not _matches(n, skip)]
    if not names:
        raise ValueError(f"prepare: {type(model).__name__} has no linear layer that skip={tuple(skip)} leaves")
    source = _Source(weights)
    for name in _reported(names, progress):
        old = model.get_submodule(name)
        new = source.frozen(name, old, device, options)
        _swap(model, name, new)
        del old
    for p in model.parameters():
        p.requires_grad_(False)
    _rest(model, source, device, dtype)
    return model


def adapt(
    model: nn.Module,
    r: int = 64,
    alpha: float = 16,
    dropout: float = 0.0,
    *,
    targets: Iterable[str] = ("*",),
    stabilized: bool = False,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """Put a `LoRALinear` around every Linear4bit whose full name a pattern of `targets` matches, in place; everything
    else is frozen. Raises ValueError where nothing matches, or as LoRALinear does, before anything is changed."""
    names = [n for n, m in model.named_modules() if isinstance(m, Linear4bit) and _matches(n, targets)]
    if not names:
        raise ValueError(f"adapt: {type(model).__name__} has no Linear4bit that targets={tuple(targets)} match")
    made = {n: LoRALinear(model.get_submodule(n), r, alpha, dropout, stabilized, dtype) for n in names}  # type: ignore[arg-type]
    model.requires_grad_(False)
    for name, layer in made.items():
        _swap(model, name, layer)
        for p in (layer.lora_A, layer.lora_B):
            p.requires_grad_(True)
    return model


def merge(model: nn.Module, dtype: torch.dtype | None = None, progress: bool | Report = False) -> nn.Module:
    """Plain `torch.nn.Linear` in place of every LoRALinear (W + s B A) and Linear4bit, in `dtype` (default: what their
    weights were before they were coded), in place; returns the model. Nothing is coded again, so nothing is lost."""
    inside = {id(m.base) for m in model.modules() if isinstance(m, LoRALinear)}
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, Linear4bit | LoRALinear) and id(m) not in inside]
    layers = dict(found)
    for name in _reported(list(layers), progress):
        layer = layers.pop(name)
        if isinstance(layer, LoRALinear):
            _swap(model, name, layer.merged(dtype))
        else:
            kind = dtype or layer.weight_dtype
            _swap(model, name, with_weight(layer, layer.dequantize(kind), kind))
        del layer
    return model


class _Source:
    """Where weights come from: the model itself, or a function that knows them by name."""

    def __init__(self, weights: Callable[[str], Tensor | None] | None) -> None:
        self.weights = weights

    def frozen(self, name: str, old: Any, device: Any, options: dict[str, Any]) -> Linear4bit:
        """The layer `name`, coded."""
        out, into = _sides(old)
        into_first = not isinstance(old, nn.Linear)
        if self.weights is None:
            return Linear4bit.of(_transposed(old) if into_first else old, device, **options)
        w = self.get(f"{name}.weight")
        bias = self.get(f"{name}.bias") if getattr(old, "bias", None) is not None else None
        made = Linear4bit(into, out, False, device="meta", dtype=_float(w, bias), **options)
        coded = self.statistics(name) if w.dtype == torch.uint8 else {}
        if coded:
            made.take(w if device is None else w.to(device), coded)
        else:
            w = w if device is None else w.to(device)
            made.store(w.T.contiguous() if into_first else w)
        if bias is not None:
            made.bias = nn.Parameter(bias.to(made.weight.device), requires_grad=False)
        return made.train(old.training)

    def get(self, name: str) -> Tensor:
        found = None if self.weights is None else self.weights(name)
        if found is None:
            raise StateError(f"prepare: weights has no {name!r}")
        return found

    def statistics(self, name: str) -> dict[str, Tensor]:
        """A checkpoint's statistics of a coded weight."""
        keys = ["absmax", "quant_map", "nested_absmax", "nested_quant_map", PREFIX + "nf4", PREFIX + "fp4"]
        found = {k: self.weights(f"{name}.weight.{k}") for k in keys if self.weights is not None}
        return {k: v for k, v in found.items() if v is not None}


def _float(w: Tensor, bias: Tensor | None) -> torch.dtype:
    return w.dtype if w.is_floating_point() else bias.dtype if bias is not None else torch.get_default_dtype()


def _linear(m: nn.Module) -> bool:
    plain = isinstance(m, nn.Linear) and not isinstance(m, Linear4bit)
    return plain or (type(m).__name__ == "Conv1D" and getattr(m, "weight", torch.empty(0)).ndim == 2)


def _sides(m: Any) -> tuple[int, int]:
    """(out, in)."""
    first, second = m.weight.shape
    return (first, second) if isinstance(m, nn.Linear) else (second, first)


def _transposed(m: Any) -> nn.Linear:
    """Conv1D as a Linear."""
    out, into = _sides(m)
    made = nn.Linear(into, out, device="meta")
    made.weight, made.bias = nn.Parameter(m.weight.detach().T.contiguous()), m.bias
    return made.train(m.training)


def _heads(model: nn.Module) -> list[nn.Module]:
    """The output layer of a transformers model."""
    get: Any = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    return [] if head is None else [head]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, p) for p in patterns)


def _swap(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _rest(model: nn.Module, source: _Source, device: Any, dtype: torch.dtype | None) -> None:
    """Move what is not coded; fill what is on the meta device; tie what was tied."""
    filled: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one too: while it lives, its id is its own
    lacking = []
    for prefix, module in model.named_modules():
        if isinstance(module, Linear4bit):
            continue
        for name, p in list(module.named_parameters(prefix, recurse=False)):
            if id(p) not in filled:
                value = p.detach() if p.device.type != "meta" else source.weights and source.weights(name)
                if value is None:
                    lacking.append(name)
                    continue
                value = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
                filled[id(p)] = p, nn.Parameter(value, requires_grad=False)
            setattr(module, name.rpartition(".")[2], filled[id(p)][1])
        for name, b in list(module.named_buffers(recurse=False)):
            if device is not None and b.device.type != "meta":
                module._buffers[name] = b.to(device)
    tie: Any = getattr(model, "tie_weights", None)
    if lacking and tie is not None:
        tie()
    still = [n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.device.type == "meta"]
    if still:
        raise StateError(f"prepare: weights has no {', '.join(map(repr, still[:5]))}")


def _reported(names: list[str], progress: bool | Report) -> Iterator[str]:
    """The names, and a report after each."""
    if progress is True:
        from rich.progress import track

        yield from track(names, description="to 4 bits")
        return
    for k, name in enumerate(names):
        yield name
        if progress:
            progress(name, k + 1, len(names))
