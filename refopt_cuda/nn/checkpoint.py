"""Folders of transformers models with 4-bit weights, in bitsandbytes' layout: written, and read a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refopt.spec import StateError
from refopt_cuda.nn.linear4bit import NAMES, Linear4bit
from refopt_cuda.nn.prepare import SKIP, Report, prepare

__all__ = ["Folder", "load", "save"]


class Folder:
    """The safetensors of a folder as a function from names to tensors, or None; nothing is read before it is asked for.

    Raises StateError for a folder without safetensors."""

    def __init__(self, folder: str | Path, device: Any = "cpu") -> None:
        self.folder, self.device = Path(folder), str(torch.device(device))
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self.files = dict(json.loads(index.read_text("utf-8"))["weight_map"])
        else:
            self.files = {}
            for file in sorted(self.folder.glob("*.safetensors")):
                with _opened(file) as f:
                    self.files |= dict.fromkeys(f.keys(), file.name)
        if not self.files:
            raise StateError(f"{self.folder} holds no *.safetensors")
        self._open: tuple[str, Any] = ("", None)

    def __call__(self, name: str) -> Tensor | None:
        if name not in self.files:
            return None
        file = self.files[name]
        if self._open[0] != file:
            self._open = (file, _opened(self.folder / file, self.device))
        return self._open[1].get_tensor(name)


def _opened(file: Path, device: str = "cpu") -> Any:
    from safetensors import safe_open

    return safe_open(file, "pt", device=device)


def load(
    folder: str | Path,
    *,
    device: Any = "cpu",
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    quant_type: str = "nf4",
    compress_statistics: bool = True,
    block: int = 64,
    skip: Iterable[str] = SKIP,
    progress: bool | Report = False,
) -> nn.Module:
    """A causal language model of transformers from a folder, its linear layers in 4 bits.

    Weights are read and coded one at a time, so that memory stays near the final size; those that bitsandbytes or
    `save` coded are taken as they are. dtype: of the rest (default: as in the folder). Other arguments as of `prepare`.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    coded = getattr(config, "quantization_config", None)
    if coded is not None:
        method = coded.get("quant_method") if isinstance(coded, dict) else coded.quant_method
        if str(getattr(method, "value", method)) != "bitsandbytes":
            raise StateError(f"load: {folder} is quantized by {method}; plain and bitsandbytes' 4-bit weights are read")
        del config.quantization_config
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    made = prepare(
        model,
        quant_type=quant_type,
        compress_statistics=compress_statistics,
        block=block,
        compute_dtype=compute_dtype,
        skip=skip,
        device=device,
        dtype=dtype,
        weights=Folder(folder, device),
        progress=progress,
    )
    return made.eval()


def save(model: nn.Module, folder: str | Path) -> None:
    """Write a transformers model that `prepare` or `load` made; `AutoModelForCausalLM.from_pretrained` loads it with
    bitsandbytes, `load` without. Raises ValueError where it holds no Linear4bit, or not all are coded alike."""
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    kinds = {(m.quant_type, m.compress_statistics, m.block) for m in layers}
    if len(kinds) != 1:
        raise ValueError(f"save: all Linear4bit must be coded alike, and there must be one; got {sorted(kinds)}")
    ((kind, nested, _),) = kinds
    plain = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Linear4bit)]
    compute = layers[0].compute_dtype or layers[0].weight_dtype
    named: Any = model
    named.config.quantization_config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": nested,
        "bnb_4bit_compute_dtype": NAMES[compute],
        "llm_int8_skip_modules": plain or None,
    }
    try:
        named.save_pretrained(folder)
    finally:
        del named.config.quantization_config
