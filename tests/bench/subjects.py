"""What is measured: our classes by their public names, and the peers that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from refopt_cuda import optim

LR = 1e-4


class Missing(Exception):
    """A class or a package that is not there."""


@dataclass(frozen=True)
class Subject:
    """A class by module and name, what it is given, and the passes it takes (a key of `moved.PASSES`)."""

    name: str
    cls: str
    options: dict[str, Any] = field(default_factory=dict)
    module: str = "refopt_cuda.optim"
    passes: str = "element"
    matrices: bool = False
    """Whether it steps matrices alone."""
    slow: bool = False
    """Whether its first step compiles for tens of seconds."""

    @property
    def peer(self) -> bool:
        return self.module != "refopt_cuda.optim"

    def make(self, params: Sequence[torch.nn.Parameter], **more: Any) -> torch.optim.Optimizer:
        """The optimizer over these parameters. Raises Missing."""
        try:
            module = optim if not self.peer else importlib.import_module(self.module)
        except ImportError as error:
            raise Missing(f"{self.module} is not installed ({error})") from None
        cls: Callable[..., torch.optim.Optimizer] | None = getattr(module, self.cls, None)
        if cls is None:
            raise Missing(f"{self.module} has no {self.cls}")
        return cls(params, **{"lr": LR, **self.options, **more})


OURS = (
    Subject("AdamW", "AdamW"),
    Subject("AdamW8bit", "AdamW8bit"),
    Subject("AdamW8bit + bf16_rem16", "AdamW8bit", {"codecs": {"p": "bf16_rem16"}}),
    Subject("AdamWFp8", "AdamWFp8"),
    Subject("AdamW4bit", "AdamW4bit"),
    Subject("Lion8bit", "Lion8bit"),
    Subject("SGD8bit", "SGD8bit", {"momentum": 0.9}),
    Subject("AdEMAMix8bit", "AdEMAMix8bit"),
    Subject("Adafactor", "Adafactor", {"relative_step": False}, passes="adafactor"),
    Subject("CAME", "CAME", passes="came"),
    Subject("LAMB", "LAMB", passes="lamb"),
    Subject("CAME8bit", "CAME8bit", passes="came"),
    Subject("LAMB8bit", "LAMB8bit", passes="lamb"),
    Subject("Muon", "Muon", matrices=True),
    Subject("GaLoreAdamW", "GaLoreAdamW", matrices=True),
)


def _peer(name: str, module: str, cls: str, **more: Any) -> Subject:
    known = {k: more.pop(k) for k in ("matrices", "slow") if k in more}
    return Subject(f"{name} {cls}{more.pop('words', '')}", cls, more, module, **known)


PEERS = (
    _peer("torch", "torch.optim", "AdamW", fused=True, words=" fused"),
    _peer("torch", "torch.optim", "Adafactor"),
    _peer("torch", "torch.optim", "Muon", matrices=True),
    _peer("bitsandbytes", "bitsandbytes.optim", "AdamW32bit"),
    _peer("bitsandbytes", "bitsandbytes.optim", "AdamW8bit"),
    _peer("bitsandbytes", "bitsandbytes.optim", "Lion8bit"),
    _peer("bitsandbytes", "bitsandbytes.optim", "AdEMAMix8bit"),
    _peer("FlashOptim", "flashoptim", "FlashAdamW", words=" 24-bit"),
    _peer("FlashOptim", "flashoptim", "FlashAdamW", master_weight_bits=None),
    _peer("FlashOptim", "flashoptim", "FlashLion", master_weight_bits=None),
    _peer("optimi", "optimi", "AdamW", kahan_sum=True, words=" Kahan"),
    _peer("torchao", "torchao.optim", "AdamW8bit", slow=True),
    _peer("torchao", "torchao.optim", "AdamWFp8", slow=True),
    _peer("torchao", "torchao.optim", "AdamW4bit", slow=True),
)


def named(*names: str) -> tuple[Subject, ...]:
    """Subjects of either list, by name. Raises ValueError."""
    known = {s.name: s for s in (*OURS, *PEERS)}
    for name in names:
        if name not in known:
            raise ValueError(f"no subject {name!r}; there are {', '.join(known)}")
    return tuple(known[name] for name in names)
