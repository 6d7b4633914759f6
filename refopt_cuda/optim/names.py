"""Friendly names: the classes that users of torch.optim and bitsandbytes look for, each a `Composed` with its words.

Each takes besides: `codecs` (one for every state, or {state: codec}), `block`, `min_8bit_size`, `maximize`, `place`.
"""

from __future__ import annotations

import warnings
from typing import Any

from refopt_cuda.optim.composed import Composed

__all__ = [
    "SGD",
    "AdEMAMix",
    "AdEMAMix4bit",
    "AdEMAMix8bit",
    "AdEMAMix32bit",
    "AdEMAMixFp8",
    "Adagrad",
    "Adagrad4bit",
    "Adagrad8bit",
    "Adagrad32bit",
    "AdagradFp8",
    "Adam",
    "Adam4bit",
    "Adam8bit",
    "Adam32bit",
    "AdamFp8",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "AdamW32bit",
    "AdamWFp8",
    "Lion",
    "Lion4bit",
    "Lion8bit",
    "Lion32bit",
    "LionFp8",
    "RMSprop",
    "RMSprop4bit",
    "RMSprop8bit",
    "RMSprop32bit",
    "RMSpropFp8",
    "SGD4bit",
    "SGD8bit",
    "SGD32bit",
    "SGDFp8",
    "Signum",
    "Signum4bit",
    "Signum8bit",
    "Signum32bit",
    "SignumFp8",
]

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


class Signum(_Named):
    """Signum (arXiv 1802.04434), decoupled decay; signSGD for momentum = 0."""

    stem = "signum"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        codecs: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        super().__init__(params, codecs, min_8bit_size, options, lr=lr, beta=momentum, weight_decay=weight_decay)


class RMSprop(_Named):
    """RMSprop, as torch.optim.RMSprop."""

    stem = "rmsprop"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        codecs: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        words = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, codecs, min_8bit_size, options, **words, momentum=momentum, centered=centered)


class Adagrad(_Named):
    """Adagrad, as torch.optim.Adagrad."""

    stem = "adagrad"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        codecs: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        words = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        words["initial_accumulator_value"] = initial_accumulator_value
        super().__init__(params, codecs, min_8bit_size, options, **words)


class AdEMAMix(_Named):
    """AdEMAMix (arXiv 2409.03137): a slow mean beside AdamW's; `t_alpha` and `t_beta3` let it in by and by."""

    stem = "ademamix"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        codecs: Any = None,
        min_8bit_size: int = 4096,
        **options: Any,
    ) -> None:
        words = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, codecs, min_8bit_size, options, **words, t_alpha=t_alpha, t_beta3=t_beta3)


KEPT = {
    "8bit": ("dynamic8", "8 bits (dynamic map, blocks of 256)"),
    "4bit": ("q4", "4 bits (blocks of 128)"),
    "Fp8": ("fp8", "8-bit floats (e4m3, blocks of 256)"),
    "32bit": ("f32", "32 bits"),
}
"""What is behind a rule's name: the usual codec of its states, and in words."""


def _kept(base: Any) -> tuple[Any, Any, Any, Any]:
    """The same class with its states kept in each of these ways."""
    made = []
    for suffix, (codec, words) in KEPT.items():
        doc = f"`{base.__name__}` whose states are kept in {words}."
        body = {"usual": codec, "__doc__": doc, "__module__": __name__}
        made.append(type(base.__name__ + suffix, (base,), body))
    return made[0], made[1], made[2], made[3]


SGD8bit, SGD4bit, SGDFp8, SGD32bit = _kept(SGD)
Adam8bit, Adam4bit, AdamFp8, Adam32bit = _kept(Adam)
AdamW8bit, AdamW4bit, AdamWFp8, AdamW32bit = _kept(AdamW)
Lion8bit, Lion4bit, LionFp8, Lion32bit = _kept(Lion)
Signum8bit, Signum4bit, SignumFp8, Signum32bit = _kept(Signum)
RMSprop8bit, RMSprop4bit, RMSpropFp8, RMSprop32bit = _kept(RMSprop)
Adagrad8bit, Adagrad4bit, AdagradFp8, Adagrad32bit = _kept(Adagrad)
AdEMAMix8bit, AdEMAMix4bit, AdEMAMixFp8, AdEMAMix32bit = _kept(AdEMAMix)
