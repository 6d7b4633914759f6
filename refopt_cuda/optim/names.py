"""Friendly names: the classes that users of torch.optim and bitsandbytes look for, each a `Composed` with its words.

Arguments stand where torch.optim has them, then where bitsandbytes has them: `optim_bits` (32, 8 or, here, 4: the
states of a plain name), `args` (None), `min_8bit_size`, `is_paged`. Each takes besides: `codecs` (one for every state,
or {state: codec}), `overrides` ({pattern of names: settings}), `block`, `maximize`, `place`, `seed`.
"""

from __future__ import annotations

from typing import Any

from refopt_cuda.optim import dialect, overrides
from refopt_cuda.optim import settings as records
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
Kept = tuple[int, Any, int, bool]
"""bitsandbytes' words on how states are kept: optim_bits, args, min_8bit_size, is_paged."""
GROUP = ("codecs", "block", "min_size", "maximize", "seed", "capturable")
"""What groups hold besides the hyper-parameters of their rule."""


class _Named(Composed):
    """One rule; `usual` is the codec of its states unless an argument says otherwise."""

    stem = ""
    usual: str | None = None

    def __init__(self, params: Any, kept: Kept, options: dict[str, Any], rule: str = "", **words: Any) -> None:
        call, (optim_bits, args, min_size, is_paged) = type(self).__name__, kept
        usual = dialect.usual(call, self.usual, optim_bits)
        options = {"min_size": min_size} | dialect.settings(call, options, args, is_paged)
        patterns = options.pop("overrides", None)
        if patterns is not None:
            stem = rule or self.stem
            known = {*words, *options, *GROUP, *records.torch_words(records.rule_named(stem, call))}
            params = overrides.of_class(params, patterns, known | {*dialect.SAME.get(stem, {})}, call)
        super().__init__(params, rule or self.stem, usual=usual, **options, **words)


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
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        if dampening or nesterov:
            dialect.once(
                "sgd",
                f"{type(self).__name__}: dampening and nesterov are torch.optim.SGD's; bitsandbytes' SGD takes both "
                "and ignores them: that is dampening=0, nesterov=False",
            )
        words: dict[str, Any] = {"lr": lr, "momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        super().__init__(
            params, (optim_bits, args, min_8bit_size, is_paged), options, weight_decay=weight_decay, **words
        )


class Lion(_Named):
    """Lion (arXiv 2302.06675), decoupled decay; `Lion8bit` keeps the momentum in 8 bits."""

    stem = "lion"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: Betas = (0.9, 0.99),
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params, (optim_bits, args, min_8bit_size, is_paged), options, lr=lr, betas=betas, weight_decay=weight_decay
        )


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
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        words: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, (optim_bits, args, min_8bit_size, is_paged), options, **words)


class Adam(_Named):
    """Adam with coupled (L2) decay, as torch.optim.Adam; `decoupled_weight_decay=True` makes it AdamW, as there.

    bitsandbytes' Adam decays decoupled.
    """

    stem = "adam"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: Betas = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Any,
    ) -> None:
        if weight_decay and not decoupled_weight_decay:
            dialect.once(
                "adam",
                f"{type(self).__name__}: weight_decay is coupled (L2), as in torch.optim.Adam; bitsandbytes' Adam "
                "decays decoupled: that is decoupled_weight_decay=True, or AdamW",
            )
        words: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        rule = "adamw" if decoupled_weight_decay else "adam"
        super().__init__(params, (optim_bits, args, min_8bit_size, is_paged), options, rule, **words)


class Signum(_Named):
    """Signum (arXiv 1802.04434), decoupled decay; signSGD for momentum = 0."""

    stem = "signum"

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            (optim_bits, args, min_8bit_size, is_paged),
            options,
            lr=lr,
            beta=momentum,
            weight_decay=weight_decay,
        )


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
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        if momentum:
            dialect.once(
                "rmsprop",
                f"{type(self).__name__}: momentum is torch.optim.RMSprop's; bitsandbytes' RMSprop takes it and "
                "ignores it: that is momentum=0",
            )
        words: dict[str, Any] = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, (optim_bits, args, min_8bit_size, is_paged), options, **words, momentum=momentum, centered=centered
        )


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
        optim_bits: int = 32,
        args: Any = None,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        words: dict[str, Any] = {"lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay, "eps": eps}
        words["initial_accumulator_value"] = initial_accumulator_value
        super().__init__(params, (optim_bits, args, min_8bit_size, is_paged), options, **words)


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
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        is_paged: bool = False,
        **options: Any,
    ) -> None:
        words: dict[str, Any] = {"lr": lr, "betas": betas, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            params, (optim_bits, None, min_8bit_size, is_paged), options, **words, t_alpha=t_alpha, t_beta3=t_beta3
        )


KEPT = {
    "8bit": ("dynamic8", "8 bits (dynamic map, blocks of 256)"),
    "4bit": ("q4", "4 bits (blocks of 128)"),
    "Fp8": ("fp8", "8-bit floats (e4m3, blocks of 256)"),
    "32bit": ("f32", "32 bits"),
}
"""What is behind a rule's name: the usual codec of its states, and in words."""


def variant(base: Any, suffix: str, module: str = __name__) -> Any:
    """The same class with its states kept as the suffix says."""
    codec, words = KEPT[suffix]
    doc = f"`{base.__name__}` whose states are kept in {words}."
    return type(base.__name__ + suffix, (base,), {"usual": codec, "__doc__": doc, "__module__": module})


def kept(base: Any, module: str = __name__) -> tuple[Any, Any, Any, Any]:
    """The class with its states kept in each of these ways, in their order."""
    one, two, three, four = (variant(base, suffix, module) for suffix in KEPT)
    return one, two, three, four


SGD8bit, SGD4bit, SGDFp8, SGD32bit = kept(SGD)
Adam8bit, Adam4bit, AdamFp8, Adam32bit = kept(Adam)
AdamW8bit, AdamW4bit, AdamWFp8, AdamW32bit = kept(AdamW)
Lion8bit, Lion4bit, LionFp8, Lion32bit = kept(Lion)
Signum8bit, Signum4bit, SignumFp8, Signum32bit = kept(Signum)
RMSprop8bit, RMSprop4bit, RMSpropFp8, RMSprop32bit = kept(RMSprop)
Adagrad8bit, Adagrad4bit, AdagradFp8, Adagrad32bit = kept(Adagrad)
AdEMAMix8bit, AdEMAMix4bit, AdEMAMixFp8, AdEMAMix32bit = kept(AdEMAMix)
