"""What a state dict alone tells: which library it is of, and the shapes of its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from refopt_cuda.codecs import CODECS
from refopt_cuda.convert.bitsandbytes import WRAPPED

LIBRARIES = ("refopt", "torch", "bitsandbytes", "torchao", "flashoptim", "transformers")

FACTORS = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))
"""Adafactor's row and column states; torch.optim's `row_var` has a last axis of length 1."""


def library_of(state_dict: Mapping[str, Any]) -> str:
    """The library that wrote a state dict; without any state, what its groups tell."""
    for _, _, flat in entries(state_dict):
        if "state1" in flat:
            return "bitsandbytes"
        if any("::" in str(key) or key == "error_bits" for key in flat):
            return "flashoptim"
        if any(type(x).__name__.startswith("OptimState") for x in flat.values()):
            return "torchao"
    groups = state_dict["param_groups"]
    for word, library in (("format", "refopt"), ("master_bytewidth", "flashoptim"), ("relative_step", "transformers")):
        if any(word in group for group in groups):
            return library
    return "torch"


def class_of(state_dict: Mapping[str, Any], where: str) -> str:
    """Which of our classes wrote a state dict of ours: "Composed" (all rules of elements), "Adafactor" or "Muon"."""
    group: Mapping[str, Any] = next(iter(state_dict["param_groups"]), {})
    for word, name in (("rule", "Composed"), ("relative_step", "Adafactor"), ("ns_steps", "Muon")):
        if word in group:
            return name
    raise ValueError(f"{where} is of neither a rule of elements nor Adafactor or Muon, which alone are converted")


def entries(state_dict: Mapping[str, Any]) -> Iterator[tuple[int, int, Mapping[str, Any]]]:
    """(group, number, entry) of every parameter in order; an entry may be empty."""
    for k, group in enumerate(state_dict["param_groups"]):
        for number in group["params"]:
            entry = state_dict["state"].get(number, {})
            yield k, number, {**entry, **entry.get(WRAPPED, {})}


def parameters(state_dict: Mapping[str, Any], dtype: torch.dtype, where: str) -> list[torch.Tensor]:
    """An unset tensor of each parameter's shape, in order; of no elements where there is no state to tell it.

    dtype  of weights that the state does not show to be bfloat16

    ValueError for 4-bit states alone: their codes are packed, so shapes are the model's to tell.
    """
    out = []
    for k, number, entry in entries(state_dict):
        shape = _shape(entry, state_dict["param_groups"][k])
        if shape is None:
            told = "its shape is not told: give the model's file"
            raise ValueError(f"{where}: state[{number}] is packed in 4 bits, {told}")
        out.append(torch.empty(shape, dtype=torch.bfloat16 if _is_bf16(entry) else dtype))
    return out


def _is_bf16(entry: Mapping[str, Any]) -> bool:
    """Whether something is kept that only bfloat16 weights have."""
    named_so = any(str(key).endswith("::scales") and x.dtype == torch.bfloat16 for key, x in entry.items())
    return named_so or any(str(key).startswith("p.") or key == "error_bits" for key in entry)


def _shape(entry: Mapping[str, Any], group: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The parameter's shape; None where every state is packed."""
    tensors = {str(key): x for key, x in entry.items() if isinstance(x, torch.Tensor) and key != "step"}
    if "state1" in tensors:
        return tuple(tensors["state2" if "state2" in tensors else "state1"].shape)
    for row, column in FACTORS:
        if row in tensors and column in tensors:
            lines = tuple(tensors[row].shape)
            return (lines if "format" in group or row != "row_var" else lines[:-1]) + tuple(tensors[column].shape[-1:])
    packed = {f"{role}.codes" for role, text in group.get("codecs", {}).items() if _bits(text) == 4}
    apart = [key for key in tensors if key.endswith((".scales", "::scales")) or key in packed]
    shapes = [tuple(x.shape) for key, x in tensors.items() if key not in apart]
    if shapes or apart:
        return shapes[0] if shapes else None
    return (0, 0) if "ns_steps" in group else (0,)  # Muon takes matrices alone


def _bits(codec: str) -> int:
    """Bits of a code of a codec by name."""
    return getattr(CODECS.get(codec.partition(":")[0].partition(".")[0]), "BITS", 0)


def of_model(weights: Mapping[str, Any], state_dict: Mapping[str, Any], where: str) -> list[torch.Tensor]:
    """The parameters that a model's file has for a state dict: by the names in its groups, else in the file's order.

    ValueError where a name is not there, or where without names there are other tensors than parameters.
    """
    names = [name for group in state_dict["param_groups"] for name in group.get("param_names", [])]
    count = sum(len(group["params"]) for group in state_dict["param_groups"])
    tensors = {name: x for name, x in weights.items() if isinstance(x, torch.Tensor)}
    if not names:
        if len(tensors) != count:
            raise ValueError(f"{where} holds {len(tensors)} tensors, the state is of {count} parameters without names")
        return list(tensors.values())
    missing = [name for name in names if name not in tensors]
    if missing:
        raise ValueError(f"{where} has no tensor {missing[0]!r}, of which there is a state")
    return [tensors[name] for name in names]
