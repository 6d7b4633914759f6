"""Friendly names: the classes that users of torch.optim and bitsandbytes look for, each a `Composed` with its words.

Each takes besides: `codecs` (one for every state, or {state: codec}), `block`, `min_8bit_size`, `maximize`, `place`.
"""

from __future__ import annotations

import warnings
from typing import Any

from refopt_cuda.optim.composed import Composed

Betas = tuple[float, float]


class _Named(Composed):
    """One rule; `usual` is the codec of its states unless an argument says otherwise."""

    stem = ""
    usual: str | None = None

    def __init__(self, params: Any, codecs: Any, min_8bit_size: int, options: dict[str, Any], **words: Any) -> None:
        super().__init__(params, self.stem, codecs, usual=self.usual, **{"min_size": min_8bit_size, **options, **words})


class SGD(_Named):
    """SGD with momentum, as torch.optim.SGD; `SGD8bit` keeps the buffer in 8 bits."""

    stem = "sgd"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        codecs: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        words = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        super().__init__(params, codecs, min_8bit_size, options, weight_decay=weight_decay, **words)


class Lion(_Named):
    """Lion (arXiv 2302.06675), decoupled decay; `Lion8bit` keeps the momentum in 8 bits."""

    stem = "lion"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        codecs: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(params, codecs, min_8bit_size, options, lr=lr, betas=betas, weight_decay=weight_decay)


class AdamW(_Named):
    """AdamW, as torch.optim.AdamW; `AdamW8bit` keeps both moments in 8 bits."""

    stem = "adamw"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        codecs: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        words = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, codecs, min_8bit_size, options, **words)


class Adam(AdamW):
    """Adam with coupled (L2) decay, as torch.optim.Adam. bitsandbytes' Adam decays decoupled: that is AdamW here."""

    stem = "adam"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        if weight_decay:
            name = type(self).__name__
            warnings.warn(
                f"{name}: weight_decay is coupled (L2), as in torch.optim.Adam; bitsandbytes' Adam decays decoupled, "
                f"which is {name.replace('Adam', 'AdamW')} here",
                stacklevel=2,
            )
        super().__init__(params, lr, betas, eps, weight_decay, **options)


class SGD8bit(SGD):
    """SGD whose momentum buffer is stored in 8 bits (dynamic map, blocks of 256)."""

    usual = "dynamic8"


class Lion8bit(Lion):
    """Lion whose momentum is stored in 8 bits (dynamic map, blocks of 256): 1.016 bytes a parameter."""

    usual = "dynamic8"


class AdamW8bit(AdamW):
    """AdamW whose moments are stored in 8 bits (dynamic map, blocks of 256): 2.03 bytes a parameter instead of 8."""

    usual = "dynamic8"


class Adam8bit(Adam):
    """Adam whose moments are stored in 8 bits (dynamic map, blocks of 256): 2.03 bytes a parameter instead of 8."""

    usual = "dynamic8"
