"""The database of cases: every rule with hyper-parameters that matter, every codec with its options.

A law is written once and runs over these lists. No value lies where two rules, or two readings of one rule, coincide:
decay is on, the betas differ, neither is a default, and no product of two of them is a power of two.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

HEAVY, ADAM = {"lr": 0.03, "momentum": 0.85, "wd": 0.07}, {"lr": 0.013, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7}
MIX = ADAM | {"beta3": 0.995, "alpha": 3.5, "wd": 0.11}
SIGNS = {"lr": 0.003, "beta1": 0.85, "beta2": 0.95, "wd": 0.2}
SQUARES = {"lr": 0.013, "alpha": 0.96, "eps": 1e-7, "wd": 0.06}


class RuleCase(NamedTuple):
    """A rule with hyper-parameters; `states` are the roles that it keeps with them, `shapes` what it steps if not
    every shape will do."""

    label: str
    stem: str
    states: tuple[str, ...]
    hyper: dict[str, Any]
    shapes: tuple[tuple[int, ...], ...] = ()

    def optimizer(self, ref: ModuleType, codecs: Any = None, place: Any = "resident", **changed: Any) -> Any:
        """The subject's Optimizer for this case, some arguments changed."""
        return ref.Optimizer(self.stem, codecs, place, **(self.hyper | changed))

    def update(self, ref: ModuleType, p: Any, g: Any, state: Any, t: int, **changed: Any) -> Any:
        """The rule's bare `update`, some hyper-parameters changed."""
        return ref.rules.RULES[self.stem].update(p, g, state, t=t, **(self.hyper | changed))


RULES = [
    RuleCase("sgd", "sgd", (), {"lr": 0.03, "wd": 0.07}),
    RuleCase("sgd-momentum", "sgd", ("buf",), HEAVY | {"dampening": 0.2}),
    RuleCase("sgd-nesterov", "sgd", ("buf",), HEAVY | {"nesterov": True}),
    RuleCase("sgd-inside", "sgd", ("buf",), HEAVY | {"nesterov": True, "lr_at": "inside", "decay": "decoupled"}),
    RuleCase("adam", "adam", ("m", "v"), ADAM | {"wd": 0.06}),
    RuleCase("adam-decoupled", "adam", ("m", "v"), ADAM | {"wd": 0.06, "eps_at": "uncorrected", "decay": "decoupled"}),
    RuleCase("adam-amsgrad", "adam", ("m", "v", "w"), ADAM | {"wd": 0.06, "amsgrad": True, "bias_correction": False}),
    RuleCase("adamw", "adamw", ("m", "v"), ADAM | {"wd": 0.11}),
    RuleCase("adamw-after", "adamw", ("m", "v"), ADAM | {"wd": 0.11, "eps_at": "inside", "decay_order": "after"}),
    RuleCase("adamw-amsgrad", "adamw", ("m", "v", "w"), ADAM | {"wd": 0.11, "amsgrad": True, "eps_at": "uncorrected"}),
    RuleCase(
        "adamw-additive",
        "adamw",
        ("m", "v"),
        ADAM | {"wd": 0.11, "decay_order": "additive", "bias_correction": False},
    ),
    RuleCase("lion", "lion", ("m",), SIGNS),
    RuleCase("lion-after", "lion", ("m",), SIGNS | {"decay_order": "after"}),
    RuleCase("lion-additive", "lion", ("m",), SIGNS | {"decay_order": "additive"}),
    RuleCase("rmsprop", "rmsprop", ("v",), SQUARES | {"eps_at": "inside"}),
    RuleCase("rmsprop-centered", "rmsprop", ("v", "a", "buf"), SQUARES | {"momentum": 0.85, "centered": True}),
    RuleCase("adagrad", "adagrad", ("s",), {"lr": 0.013, "lr_decay": 0.03, "wd": 0.06, "eps": 1e-7}),
    RuleCase(
        "adagrad-started",
        "adagrad",
        ("s",),
        {"lr": 0.013, "init_acc": 0.003, "wd": 0.06, "eps": 1e-7, "eps_at": "inside"},
    ),
    RuleCase("signum", "signum", ("m",), {"lr": 0.003, "beta": 0.85, "wd": 0.2}),
    RuleCase("signum-additive", "signum", ("m",), {"lr": 0.003, "beta": 0.85, "wd": 0.2, "decay_order": "additive"}),
    RuleCase("signsgd", "signum", (), {"lr": 0.003, "beta": 0.0, "wd": 0.2, "decay_order": "after"}),
    RuleCase("ademamix", "ademamix", ("m1", "m2", "v"), MIX | {"t_alpha": 3, "t_beta3": 5}),
    RuleCase("ademamix-additive", "ademamix", ("m1", "m2", "v"), MIX | {"decay_order": "additive"}),
    RuleCase("ademamix-slow", "ademamix", ("m2", "v"), MIX | {"beta1": 0.0, "decay_order": "after"}),
]
"""Element rules: laws of elements, blocks and pages hold for them."""

PLANES = ((5, 3), (3, 40), (1, 7), (17, 16))
MATRICES = ((5, 3), (3, 40), (2, 3, 17), (1, 7))
FACTORS = {"eps1": 1e-12, "eps2": 0.03, "clip": 0.8, "decay_rate": -0.6}
CAME = {"lr": 0.003, "beta1": 0.8, "beta2": 0.97, "beta3": 0.99, "eps1": 1e-12, "eps2": 1e-6, "clip": 0.8, "wd": 0.2}
GALORE = ADAM | {"wd": 0.2, "rank": 2, "gap": 2, "scale": 0.7}
APOLLO = ADAM | {"wd": 0.2, "rank": 2, "gap": 2, "scale": 1.7}

WHOLE = [
    RuleCase("adafactor", "adafactor", ("R", "C"), FACTORS | {"wd": 0.3}, MATRICES),
    RuleCase(
        "adafactor-momentum",
        "adafactor",
        ("R", "C", "m"),
        {"lr": 0.02, "relative_step": False, "scale_parameter": False, "beta1": 0.8, "wd": 0.2},
        MATRICES,
    ),
    RuleCase(
        "adafactor-vector",
        "adafactor",
        ("V", "m"),
        {"warmup_init": True, "beta1": 0.7, "wd": 0.4},
        ((), (1,), (31,), (129,)),
    ),
    RuleCase("adafactor-torch", "adafactor", ("R", "C"), FACTORS | {"variant": "torch", "lr": 4e-3, "wd": 3}, MATRICES),
    RuleCase("came", "came", ("R", "C", "m", "Rr", "Cr"), CAME, MATRICES),
    RuleCase("came-vector", "came", ("V", "m"), CAME, ((), (1,), (31,), (129,))),
    RuleCase("adam_mini-rows", "adam_mini", ("m", "v"), ADAM | {"wd": 0.11}, MATRICES),
    RuleCase(
        "adam_mini-heads",
        "adam_mini",
        ("m", "v"),
        ADAM | {"wd": 0.11, "blocks": "heads", "heads": 3},
        ((3, 40), (6, 5), (9, 2, 17)),
    ),
    RuleCase("adam_mini-whole", "adam_mini", ("m", "v"), ADAM | {"wd": 0.11, "blocks": "whole"}),
    RuleCase("adam_mini-elementwise", "adam_mini", ("m", "v"), ADAM | {"wd": 0.11, "blocks": "elementwise"}),
    RuleCase("muon", "muon", ("B",), {"lr": 0.003, "momentum": 0.8, "ns_steps": 4, "eps": 1e-5, "wd": 0.2}, PLANES),
    RuleCase(
        "muon-matched",
        "muon",
        ("B",),
        {"lr": 0.003, "nesterov": False, "adjust_lr": "match_rms_adamw", "eps_at": "added", "wd": 0.3},
        PLANES,
    ),
    RuleCase("galore", "galore", ("P", "m", "v"), GALORE, ((3, 5), (3, 40), (16, 17))),
    RuleCase("galore-right", "galore", ("Q", "m", "v"), GALORE | {"proj_type": "right"}, ((5, 3), (3, 40), (16, 17))),
    RuleCase("galore-full", "galore", ("P", "Q", "m", "v"), GALORE | {"proj_type": "full"}, ((5, 3), (3, 40))),
    RuleCase("galore-sgd", "galore", ("P",), GALORE | {"inner": "sgd"}, ((3, 5), (3, 40))),
    RuleCase("apollo", "apollo", ("m", "v", "prev"), APOLLO, ((5, 3), (3, 40), (16, 17))),
    RuleCase(
        "apollo-mini",
        "apollo",
        ("m", "v", "prev"),
        APOLLO | {"rank": 1, "scale": 9.0, "scale_type": "tensor", "scale_front": True, "proj_type": "right"},
        PLANES,
    ),
    RuleCase("apollo-unlimited", "apollo", ("m", "v"), APOLLO | {"limiter": False}, ((5, 3), (3, 40), (16, 17))),
    RuleCase("sm3", "sm3", ("mu", "m"), {"lr": 0.03, "momentum": 0.8}),
    RuleCase("sm3-plain", "sm3", ("mu",), {"lr": 0.03, "momentum": 0.0, "eps": 1e-8}),
    RuleCase("sm3-I", "sm3", ("mu", "m"), {"lr": 0.03, "momentum": 0.7, "variant": "I"}),
    RuleCase("lars", "lars", ("v",), {"lr": 0.7, "trust": 0.02, "momentum": 0.85, "wd": 0.07, "eps": 1e-6}),
    RuleCase("lars-optax", "lars", ("v",), {"trust": 0.02, "wd": 0.07, "variant": "optax", "exclude_1d": True}),
    RuleCase("lars-clip", "lars", ("v",), {"lr": 0.05, "wd": 0.07, "variant": "clip", "max_unorm": 0.03}),
    RuleCase("lamb", "lamb", ("m", "v"), ADAM | {"wd": 0.06, "phi_low": 0.3, "phi_high": 4.0}),
    RuleCase("lamb-apex", "lamb", ("m", "v"), ADAM | {"wd": 0.06, "variant": "apex", "bias_correction": False}),
    RuleCase(
        "lamb-clip",
        "lamb",
        ("m", "v"),
        ADAM | {"wd": 0.06, "variant": "clip", "max_unorm": 0.1, "exclude_1d": True},
    ),
    RuleCase(
        "schedule_free",
        "schedule_free",
        ("z", "v", "weight_sum", "lr_max"),
        ADAM | {"wd": 0.06, "r": 0.5, "lr_power": 1.5, "warmup": 3},
    ),
]
"""Rules that see whole tensors: sums over rows, blocks or all, and products of matrices."""

EVERY = [*RULES, *WHOLE]
BY_LABEL = {c.label: c for c in EVERY}
STATEFUL = [c for c in RULES if c.states]


class CodecCase(NamedTuple):
    """A codec with options: the code of zero, the relative error of half an extreme, whether zeros stay zeros, and
    which powers of two change no code."""

    label: str
    stem: str
    options: dict[str, Any]
    zero: int = 0
    rough: float = 0.04
    zeros: bool = True
    octaves: int = 1

    def record(self, ref: ModuleType) -> Any:
        """The subject's record with these options."""
        codec = ref.codecs.CODECS[self.stem]
        return codec(**self.options) if self.options else codec

    @property
    def signed(self) -> bool:
        return self.options.get("signed", True)


CODECS = [
    CodecCase("f32", "f32", {}),
    CodecCase("bf16", "bf16", {}),
    CodecCase("int8_linear", "int8_linear", {}),
    CodecCase("int8_linear-7", "int8_linear", {"block": 7}),
    CodecCase("int8_linear-unsigned", "int8_linear", {"signed": False, "block": 32}),
    CodecCase("dynamic8", "dynamic8", {}, 127),
    CodecCase("dynamic8-7", "dynamic8", {"block": 7}, 127),
    CodecCase("dynamic8-flat", "dynamic8", {"block": 64, "layout": "flat"}, 127),
    CodecCase("dynamic8-unsigned", "dynamic8", {"signed": False, "block": 32}),
    CodecCase("fp8", "fp8", {}),
    CodecCase("fp8-7", "fp8", {"block": 7}),
    CodecCase("fp8-e5m2", "fp8", {"format": "e5m2", "block": 32}),
    CodecCase("fp8-tensor", "fp8", {"scale": "tensor"}),
    CodecCase("compand8", "compand8", {"scale": "bf16"}),
    CodecCase("compand8-unsigned", "compand8", {"scale": "bf16", "signed": False, "block": 7}, octaves=2),
    CodecCase("q4", "q4", {}, 7, 0.15),
    CodecCase("q4-7-low", "q4", {"block": 7, "first": "low"}, 7, 0.15),
    CodecCase("nf4", "nf4", {}, 7, 0.15),
    CodecCase("nf4-rows", "nf4", {"block": 32, "layout": None}, 7, 0.15),
    CodecCase("fp4", "fp4", {}, 0, 0.04),
    CodecCase("double", "double", {}, 7, 0.15),
    CodecCase("double-fp4", "double", {"base": "fp4", "block": 32}, 0, 0.04),
    CodecCase("fp8_expand", "fp8_expand", {}, octaves=2),
    CodecCase("fp8_expand-7", "fp8_expand", {"block": 7}, octaves=2),
    CodecCase("q4-unsigned", "q4", {"signed": False, "block": 32}, 0, 0.15, zeros=False),
    CodecCase("q4-rank1", "q4", {"scale": "rank1"}, 7, 0.15),
    CodecCase("q4-rank1-unsigned", "q4", {"scale": "rank1", "signed": False}, 0, 0.15, zeros=False),
]
WEIGHTS = [
    CodecCase("bf16_sr", "bf16_sr", {}),
    CodecCase("bf16_kahan", "bf16_kahan", {}),
    CodecCase("bf16_rem16", "bf16_rem16", {}),
    CodecCase("bf16_ecc", "bf16_ecc", {}),
    CodecCase("bf16_ecc-16", "bf16_ecc", {"bits": 16}),
]
"""Formats of weights: codecs of `p` alone, stepped by an Optimizer."""

ORDERED = [c for c in CODECS if c.stem != "double"]
"""Codecs that keep signs and order."""

BLOCKED = [c for c in ORDERED if c.stem not in ("f32", "bf16") and c.options.get("scale") not in ("tensor", "rank1")]
"""Codecs whose blocks know nothing of one another."""

STEMS = ["f32", "bf16", "int8_linear", "dynamic8", "fp8", "q4", "compand8", "fp8_expand"]


def label(case: Any) -> str:
    """A case's name in pytest's output."""
    return case.label
