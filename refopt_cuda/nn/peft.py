"""Under peft: `LoraConfig(...)` targets Linear4bit as it does torch.nn.Linear; `config` also makes merging exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from refopt_cuda.nn.linear4bit import Linear4bit
from refopt_cuda.nn.lora import with_weight

__all__ = ["config"]


def config(**options: Any) -> Any:
    """`peft.LoraConfig(**options)` whose adapters of Linear4bit can be merged.

    Without it an adapter trains, saves and loads just as well, and merging fails: peft adds to the stored bytes. With
    it `merge_and_unload` gives plain layers, W + s B A in the dtype of the weights before they were coded, and
    `unmerge_adapter` the 4-bit layers as they were. Defaults are QLoRA's: r=64, lora_alpha=16, every linear layer.
    """
    from peft import LoraConfig

    chosen: dict[str, Any] = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"} | options
    made = LoraConfig(**chosen)
    made._register_custom_module({Linear4bit: _adapter()})
    return made


def _adapter() -> type[nn.Module]:
    """peft's own layer for torch.nn.Linear, with a merge that decodes."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import check_adapters_to_merge

    class LoRA4bit(Linear):
        """peft's adapter around a Linear4bit."""

        frozen: Linear4bit | None = None

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Put a plain layer with W + the adapters' B A in the place of the 4-bit one."""
            names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
            if not names:
                return
            if any(n in self.lora_variant or self.lora_bias[n] for n in names):
                raise ValueError(f"merge: only plain adapters without a bias can be merged into 4 bits, got {names}")
            base: Any = self.get_base_layer()
            if isinstance(base, Linear4bit):
                w, dtype = base.dequantize(torch.float32), base.weight_dtype
            else:
                w, dtype = base.weight.float(), base.weight.dtype
            for name in names:
                w = w + self.get_delta_weight(name).float()
            if safe_merge and not torch.isfinite(w).all():
                raise ValueError(f"merge: adapters {names} hold NaN or Inf")
            if isinstance(base, Linear4bit):
                self.__dict__["frozen"] = base  # no submodule: it is neither saved nor moved twice
            self.base_layer = with_weight(base, w, dtype)
            self.merged_adapters.extend(names)

        def unmerge(self) -> None:
            """Put the 4-bit layer back."""
            if self.frozen is not None:
                self.base_layer = self.__dict__.pop("frozen")
            self.merged_adapters.clear()

    return LoRA4bit
