"""State dicts of optimizers on disk: torch's own files, read without running code from them, and safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

TORCH = (".pt", ".pth", ".bin", ".ckpt")
SAFE = ".safetensors"
HEADER = "refopt"
"""The entry of a safetensors file's metadata that holds everything which is no tensor, as JSON."""


def read(path: str | Path) -> Any:
    """What a file holds, on the CPU.

    path  `.pt`, `.pth`, `.bin`, `.ckpt`: loaded with `weights_only=True`, so nothing in it is run; torchao must be
          imported before its states can be read. `.safetensors` as `write` makes them; another one is a flat dictionary

    Raises ValueError for another ending, and what torch or safetensors raise for a damaged file.
    """
    path = Path(path)
    if path.suffix in TORCH:
        return torch.load(path, map_location="cpu", weights_only=True)
    _check(path, "read")
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors, header = {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    return _joined(tensors, json.loads(header[HEADER])) if HEADER in header else tensors


def write(state_dict: Mapping[str, Any], path: str | Path) -> None:
    """Save a state dict; the file is complete or not there.

    path  as for `read`. In `.safetensors` the tensor `state.0.m.codes` is `state_dict["state"][0]["m.codes"]`, and the
          metadata's entry "refopt" has the rest as JSON; lists and tuples come back as tuples, but for `params`

    Raises ValueError for another ending, and TypeError for what safetensors cannot hold (torchao's tensor subclasses).
    """
    path = Path(path)
    parts = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix in TORCH:
            torch.save(dict(state_dict), parts)
        else:
            _check(path, "write")
            from safetensors.torch import save_file

            tensors, rest = _split(state_dict)
            save_file(tensors, parts, {HEADER: json.dumps(rest)})
        os.replace(parts, path)
    finally:
        parts.unlink(missing_ok=True)


def _check(path: Path, call: str) -> None:
    if path.suffix != SAFE:
        raise ValueError(f"{call}: {path.name} must end in {', '.join(TORCH)} or {SAFE}")


def _split(state_dict: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors by their path, and the tree without them."""
    tensors: dict[str, torch.Tensor] = {}

    def walk(x: Any, path: str) -> Any:
        if isinstance(x, torch.Tensor):
            if type(x) not in (torch.Tensor, torch.nn.Parameter):
                raise TypeError(
                    f"write: {path} is a {type(x).__name__}, which safetensors cannot hold; write a .pt file"
                )
            tensors[path] = x.detach().contiguous().clone()
            return {"tensor": path}
        if isinstance(x, Mapping):
            return {"items": [[k, walk(v, f"{path}.{k}" if path else str(k))] for k, v in x.items()]}
        if isinstance(x, list | tuple):
            return [walk(v, f"{path}.{k}") for k, v in enumerate(x)]
        return x

    return tensors, walk(state_dict, "")


def _joined(tensors: Mapping[str, torch.Tensor], tree: Any, key: Any = "") -> Any:
    """The tree with its tensors."""
    if isinstance(tree, dict):
        if "tensor" in tree:
            return tensors[tree["tensor"]]
        return {k: _joined(tensors, v, k) for k, v in tree["items"]}
    if isinstance(tree, list):
        made = [_joined(tensors, v) for v in tree]
        return made if key in ("params", "param_groups", "param_names") else tuple(made)
    return tree
