"""LAMB, LARS, Adafactor, CAME and Adam-mini: each a `Whole` with its words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from refopt_cuda.optim import dialect, names
from refopt_cuda.optim.whole import Whole

__all__ = [
    "CAME",
    "LAMB",
    "LARS",
    "Adafactor",
    "Adafactor4bit",
    "Adafactor8bit",
    "Adafactor32bit",
    "AdafactorFp8",
    "AdamMini",
    "AdamMini4bit",
    "AdamMini8bit",
    "AdamMini32bit",
    "AdamMiniFp8",
    "CAME4bit",
    "CAME8bit",
    "CAME32bit",
    "CAMEFp8",
    "LAMB4bit",
    "LAMB8bit",
    "LAMB32bit",
    "LAMBFp8",
    "LARS4bit",
    "LARS8bit",
    "LARS32bit",
    "LARSFp8",
]

Betas = tuple[float, float]


def _dialect(call: str, variant: str, unorm: tuple[float, float], theirs: str) -> None:
    """What LAMB and LARS make of bitsandbytes' words: a word on its formula, an error for what is not here.

    unorm   max_unorm as given, and its default
    theirs  arguments of bitsandbytes' formula
    """
    if variant == "clip":
        return
    if unorm[0] != unorm[1]:
        raise ValueError(f"{call}: max_unorm is of variant='clip', bitsandbytes' formula; this is {variant!r}")
    dialect.once(
        theirs,
        f"{call}: steps are measured by the weights' norm, as in the paper; bitsandbytes cuts those longer than "
        f"max_unorm norms: that is {theirs}",
    )


class LAMB(Whole):
    """LAMB (arXiv 1904.00962): Adam's direction, in steps as long as the weights are. Arguments as apex's FusedLAMB.

    phi         bounds of the weights' norm; None: no upper bound
    variant     "paper"; "apex": no trust ratio without decay; "clip": bitsandbytes', AdamW cut to `max_unorm` norms
    exclude_1d  biases and norms go without ratio and without decay
    """

    stem = "lamb"
    NAMES: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        "lr": "lr",
        "bias_correction": "bias_correction",
        "betas": ("beta1", "beta2"),
        "eps": "eps",
        "weight_decay": "wd",
        "phi": ("phi_low", "phi_high"),
        "variant": "variant",
        "max_unorm": "max_unorm",
        "exclude_1d": "exclude_1d",
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 1.0,
        *,
        phi: tuple[float, float | None] = (0.0, None),
        variant: str = "paper",
        exclude_1d: bool = False,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        call, theirs = type(self).__name__, "variant='clip', eps=1e-8, weight_decay=0"
        dialect.refuse(
            call,
            amsgrad=(amsgrad, False, "LAMB keeps no largest second moment"),
            adam_w_mode=(adam_w_mode, True, "LAMB's decay is decoupled"),
        )
        _dialect(call, variant, (max_unorm, 1.0), theirs)
        words: dict[str, Any] = {
            "lr": lr,
            "bias_correction": bias_correction,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        words |= {"phi": phi, "variant": variant, "max_unorm": max_unorm, "exclude_1d": exclude_1d}
        super().__init__(params, words, maximize, options, (optim_bits, args, min_8bit_size))


class LARS(Whole):
    """LARS (arXiv 1708.03888): momentum, in steps that are a share of the weights' norm.

    trust_coefficient  that share
    variant     "paper"; "optax": over the norm of g + wd p; "clip": bitsandbytes', SGD cut to `max_unorm` norms
    exclude_1d  biases and norms go without rate and without decay
    """

    stem = "lars"
    NAMES: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        "lr": "lr",
        "momentum": "momentum",
        "weight_decay": "wd",
        "trust_coefficient": "trust",
        "eps": "eps",
        "variant": "variant",
        "max_unorm": "max_unorm",
        "exclude_1d": "exclude_1d",
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        max_unorm: float = 0.02,
        *,
        trust_coefficient: float = 1e-3,
        eps: float = 0.0,
        variant: str = "paper",
        exclude_1d: bool = False,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        call, why = type(self).__name__, "LARS has plain momentum, and bitsandbytes' LARS ignores this"
        dialect.refuse(call, dampening=(dampening, 0.0, why), nesterov=(nesterov, False, why))
        theirs = "variant='clip', momentum=0"
        _dialect(call, variant, (max_unorm, 0.02), theirs)
        words: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
        }
        words |= {"eps": eps, "variant": variant, "max_unorm": max_unorm, "exclude_1d": exclude_1d}
        super().__init__(params, words, maximize, options, (optim_bits, args, min_8bit_size))


class Adafactor(Whole):
    """Adafactor (arXiv 1804.04235), with the arguments of transformers; variant="torch" is torch.optim.Adafactor.

    eps            (added to g^2, least RMS of weights); None: 1e-30, and for torch's variant 2^-23, least sqrt(V)
    clip_threshold, decay_rate  torch.optim calls them d and beta2_decay, and so they may be called here
    """

    stem = "adafactor"
    NAMES: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        "lr": "lr",
        "eps": ("eps1", "eps2"),
        "clip_threshold": "clip",
        "decay_rate": "decay_rate",
        "beta1": "beta1",
        "weight_decay": "wd",
        "scale_parameter": "scale_parameter",
        "relative_step": "relative_step",
        "warmup_init": "warmup_init",
        "variant": "variant",
    }

    def __init__(
        self,
        params: Any,
        lr: float | None = None,
        eps: tuple[float | None, float] = (None, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        variant: str = "transformers",
        d: float | None = None,
        beta2_decay: float | None = None,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        words: dict[str, Any] = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold if d is None else d,
            "beta1": beta1,
        }
        words |= {"decay_rate": decay_rate if beta2_decay is None else beta2_decay, "weight_decay": weight_decay}
        words |= {"scale_parameter": scale_parameter, "relative_step": relative_step, "warmup_init": warmup_init}
        super().__init__(params, words | {"variant": variant}, maximize, options)


class CAME(Whole):
    """CAME (arXiv 2307.02047): Adafactor with momentum, slowed where the momentum is unsure. Arguments as CAME.py's."""

    stem = "came"
    NAMES: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        "lr": "lr",
        "eps": ("eps1", "eps2"),
        "clip_threshold": "clip",
        "betas": ("beta1", "beta2", "beta3"),
        "weight_decay": "wd",
    }

    def __init__(
        self,
        params: Any,
        lr: float = 2e-4,
        eps: tuple[float, float] = (1e-30, 1e-16),
        clip_threshold: float = 1.0,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        words: dict[str, Any] = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "betas": betas,
            "weight_decay": weight_decay,
        }
        super().__init__(params, words, maximize, options)


class AdamMini(Whole):
    """Adam-mini (arXiv 2406.16793): AdamW with one second moment for each block of weights.

    blocks  "rows": each index of the first axis; "heads": the first axis in `heads` equal parts; "whole";
            "elementwise". Parameters that differ in this need groups of their own, for vectors have no rows:
            overrides={"*bias": {"blocks": "elementwise"}, "*norm*": {"blocks": "whole"}}
    """

    stem = "adam_mini"
    NAMES: ClassVar[Mapping[str, str | tuple[str, ...]]] = {
        "lr": "lr",
        "betas": ("beta1", "beta2"),
        "eps": "eps",
        "weight_decay": "wd",
        "blocks": "blocks",
        "heads": "heads",
    }

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        blocks: str = "rows",
        heads: int = 1,
        maximize: bool = False,
        **options: Any,
    ) -> None:
        words: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "blocks": blocks,
            "heads": heads,
        }
        super().__init__(params, words, maximize, options)


LAMB8bit, LAMB4bit, LAMBFp8, LAMB32bit = names.kept(LAMB, __name__)
LARS8bit, LARS4bit, LARSFp8, LARS32bit = names.kept(LARS, __name__)
Adafactor8bit, Adafactor4bit, AdafactorFp8, Adafactor32bit = names.kept(Adafactor, __name__)
CAME8bit, CAME4bit, CAMEFp8, CAME32bit = names.kept(CAME, __name__)
AdamMini8bit, AdamMini4bit, AdamMiniFp8, AdamMini32bit = names.kept(AdamMini, __name__)
