"""What else it could be: documented dialects, and mistakes that have been made before, as changes to a rule's step.

A dialect is an option of a rule, or another rule; a defect is what no documentation asks for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from refopt.conform import changes
from refopt.conform.changes import Around, Hyper, Make, betas_of
from refopt.conform.measure import Step
from refopt.spec import Rule

f32 = np.float32


class Dialect(NamedTuple):
    """`id` is what reports and exceptions call it; `says` a sentence; `when` whether it can matter at all; `loose` how
    many ulps of float32 apart states may be, where they are kept in fewer bits."""

    id: str
    says: str
    around: Around
    when: Callable[[Rule, Hyper], bool]
    kind: str = "dialect"
    loose: float = 0.0
    slack: Callable[[Hyper, int], float] | None = None
    """How much of a step's length, at step t, hardware's approximations may take or add."""


def has(*names: str) -> Callable[[Rule, Hyper], bool]:
    """Rules with all of these hyper-parameters, at values that count."""
    return lambda rule, hyper: all(hyper.get(n) not in (None, False, 0, 0.0) for n in names)


def option(name: str, value: Any) -> tuple[Around, Callable[[Rule, Hyper], bool]]:
    """Another value of an option of the record."""

    def around(make: Make, rule: Rule, hyper: Hyper) -> Step:
        return make(rule, hyper | {name: value})

    return around, lambda rule, hyper: hyper.get(name, value) != value


def known(rule: Rule, name: str, value: Any) -> bool:
    """Whether an option of that name takes that value."""
    return any(h.name == name and (not h.choices or value in h.choices) for h in rule.hypers)


OPTIONS: list[tuple[str, str, Any, str]] = [
    ("decay-order-after", "decay_order", "after", "weights decay after the step, not before it"),
    ("decay-order-additive", "decay_order", "additive", "wd p joins the step instead of shrinking the old weights"),
    ("decay-order-before", "decay_order", "before", "the old weights shrink before the step"),
    ("decay-decoupled", "decay", "decoupled", "weight decay is decoupled: p (1 - lr wd), not g + wd p"),
    ("decay-coupled", "decay", "coupled", "weight decay is coupled: g + wd p"),
    ("eps-uncorrected", "eps_at", "uncorrected", "eps is added to sqrt(v) before the bias correction"),
    ("eps-inside", "eps_at", "inside", "eps is added under the root"),
    ("eps-outside", "eps_at", "outside", "eps is added outside the root, after the correction"),
    ("eps-added", "eps_at", "added", "eps is added to the norm"),
    ("no-bias-correction", "bias_correction", False, "m and v are not corrected for their start at zero"),
    ("bias-correction", "bias_correction", True, "m and v are corrected for their start at zero"),
    ("lr-inside", "lr_at", "inside", "lr multiplies g on its way into the buffer, not the buffer"),
    ("lr-outside", "lr_at", "outside", "lr multiplies the buffer, not g on its way into it"),
    ("variant-torch", "variant", "torch", "the variant of torch.optim"),
    ("variant-transformers", "variant", "transformers", "the variant of transformers"),
    ("variant-apex", "variant", "apex", "apex's variant: no trust ratio where nothing decays"),
    ("variant-clip", "variant", "clip", "the step is only cut where it is long (bitsandbytes), not set to a length"),
    ("variant-optax", "variant", "optax", "the norm of g + wd p, as in optax"),
    ("variant-paper", "variant", "paper", "the paper's trust ratio"),
    ("sm3-I", "variant", "I", "SM3-I, not SM3-II"),
    ("adjust-lr-matched", "adjust_lr", "match_rms_adamw", "lr is scaled to the size of AdamW's steps (Moonshot)"),
]
"""(id, option, value, says) of the records' own dialects."""

IGNORED = [
    ("amsgrad-ignored", "amsgrad", False, "amsgrad=True is accepted and ignored"),
    ("nesterov-ignored", "nesterov", False, "nesterov=True is accepted and ignored"),
    ("dampening-ignored", "dampening", 0.0, "dampening is accepted and ignored"),
    ("momentum-ignored", "momentum", 0.0, "momentum is accepted and ignored"),
    ("centered-ignored", "centered", False, "centered=True is accepted and ignored"),
    ("lr-decay-ignored", "lr_decay", 0.0, "lr_decay is accepted and ignored"),
    ("decay-ignored", "wd", 0.0, "weight decay is accepted and ignored"),
    ("eps-ignored", "eps", 0.0, "eps is accepted and ignored"),
    ("ramp-ignored", "t_beta3", None, "the ramp of beta3 is accepted and ignored"),
    ("alpha-ramp-ignored", "t_alpha", None, "the ramp of alpha is accepted and ignored"),
]
"""(id, hyper-parameter, the value that switches it off, says)."""


def loses(beta: float) -> bool:
    """Whether 1 - beta in float32 is off by more than roundings can be."""
    return abs(float(f32(1) - f32(beta)) - (1.0 - beta)) > 32 * float(np.spacing(f32(1.0 - beta)))


def uses_t(rule: Rule, hyper: Hyper) -> bool:
    return rule.stem in ("adam", "adamw", "ademamix", "lamb", "adafactor", "adam_mini", "galore", "apollo") and (
        hyper.get("bias_correction", True)
    )


def corrects(rule: Rule, hyper: Hyper) -> bool:
    stems = ("adam", "adamw", "ademamix", "lamb", "schedule_free")
    return rule.stem in stems and hyper.get("bias_correction", True)


def not_coupled(rule: Rule, hyper: Hyper) -> bool:
    return has("wd")(rule, hyper) and not known(rule, "decay", "coupled") and rule.stem not in COUPLED


COUPLED = ("rmsprop", "adagrad", "lars", "lamb", "schedule_free")


def is_stem(*stems: str) -> Callable[[Rule, Hyper], bool]:
    return lambda rule, hyper: rule.stem in stems


def coupled_now(rule: Rule, hyper: Hyper) -> bool:
    return has("wd")(rule, hyper) and rule.stem in ("rmsprop", "adagrad")


def squares_alone(momentum: bool) -> Callable[[Rule, Hyper], bool]:
    def when(rule: Rule, hyper: Hyper) -> bool:
        return coupled_now(rule, hyper) and not hyper.get("centered") and bool(hyper.get("momentum")) == momentum

    return when


def decays_by_lr(rule: Rule, hyper: Hyper) -> bool:
    return has("wd", "lr")(rule, hyper) and rule.stem not in COUPLED and hyper.get("decay") != "coupled"


def both(a: Callable[[Rule, Hyper], bool], b: Callable[[Rule, Hyper], bool]) -> Callable[[Rule, Hyper], bool]:
    return lambda rule, hyper: a(rule, hyper) and b(rule, hyper)


FURTHER = [
    Dialect(
        "debiased-states",
        "m and v are stored corrected: the betas change with t instead (optimi)",
        changes.debiased,
        lambda rule, hyper: rule.stem in ("adam", "adamw") and not hyper["amsgrad"] and hyper["bias_correction"],
    ),
    Dialect(
        "state-bf16",
        "states are rounded to bfloat16 after each step",
        changes.kept_in_bf16,
        lambda rule, hyper: True,
        "defect",
        2.0**16,
    ),
    Dialect(
        "arithmetic-bf16",
        "states are bfloat16, and so is the arithmetic between the roundings",
        changes.kept_in_bf16,
        lambda rule, hyper: True,
        "defect",
        2.0**16 * 8,
    ),
    Dialect("decay-coupled", "weight decay is coupled: g + wd p", changes.by_gradient, not_coupled),
    Dialect(
        "decay-decoupled", "weight decay is decoupled: p (1 - lr wd), not g + wd p", changes.decoupled, coupled_now
    ),
    Dialect("decay-without-lr", "weights shrink by wd, not by lr wd", changes.unscaled, decays_by_lr),
    Dialect(
        "decay-by-lr",
        "weights shrink by lr wd, without the size of the weights",
        changes.by_lr,
        lambda rule, hyper: rule.stem == "adafactor" and has("wd")(rule, hyper),
    ),
    Dialect(
        "variant-clip-bitsandbytes",
        "the step is only cut where it is long, measured before the bias correction, after the old weights have shrunk",
        changes.cut_lamb,
        is_stem("lamb"),
    ),
    Dialect(
        "variant-clip-bitsandbytes",
        "the step is only cut where it is long, measured with its decay (bitsandbytes)",
        changes.cut_lars,
        is_stem("lars"),
    ),
    Dialect(
        "buffer-of-steps",
        "the buffer holds minus the step, lr in it, and is added to the weights (optax)",
        changes.of_steps,
        lambda rule, hyper: rule.stem in ("lars", "rmsprop") and has("momentum")(rule, hyper),
    ),
    Dialect(
        "dampening-is-a-switch",
        "dampening is a switch: any value but 0 means dampening = momentum (optimi)",
        changes.damped_by_momentum,
        lambda rule, hyper: rule.stem == "sgd" and has("momentum", "dampening")(rule, hyper),
    ),
    Dialect(
        "signum-beta1", "one beta for both mixtures: Signum with beta1", changes.sign_of_one("beta1"), is_stem("lion")
    ),
    Dialect(
        "signum-beta2", "one beta for both mixtures: Signum with beta2", changes.sign_of_one("beta2"), is_stem("lion")
    ),
    Dialect(
        "first-step-damped",
        "dampening applies to the first gradient too, to a buffer that begins at zero",
        changes.damped_first,
        lambda rule, hyper: rule.stem == "sgd" and has("momentum", "dampening")(rule, hyper),
    ),
    Dialect(
        "one-minus-beta-f32",
        "1 - beta is computed in float32, where it has lost digits",
        changes.narrow,
        lambda rule, hyper: any(loses(hyper[n]) for n in betas_of(hyper)),
        "defect",
    ),
    Dialect(
        "corrections-f32",
        "the bias corrections 1 - beta^t are computed in float32, where they have lost digits",
        changes.corrections_in_f32,
        corrects,
        "defect",
    ),
    Dialect(
        "scalars-f32",
        "1 - beta and the bias corrections are computed in float32, the powers by a GPU's fast arithmetic or as near",
        changes.scalars_in_f32,
        lambda rule, hyper: corrects(rule, hyper) and any(loses(hyper[n]) for n in betas_of(hyper)),
        "defect",
        slack=changes.by_fast_powers,
    ),
    Dialect(
        "decay-skips-the-step",
        "weight decay enters the mean of squares, not the step: it slows weights down and shrinks none",
        changes.accumulated,
        squares_alone(momentum=False),
        "defect",
    ),
    Dialect(
        "momentum-ignored+decay-skips-the-step",
        "momentum is accepted and ignored, and weight decay enters the mean of squares, not the step",
        changes.accumulated,
        squares_alone(momentum=True),
        "defect",
    ),
    Dialect(
        "betas-swapped", "beta1 and beta2 are swapped", changes.swapped, lambda rule, hyper: "beta2" in hyper, "defect"
    ),
    Dialect("t-ahead", "t is one ahead", changes.at(lambda t: t + 1), uses_t, "defect"),
    Dialect("t-behind", "t is one behind", changes.at(lambda t: t - 1), uses_t, "defect"),
    Dialect("t-stuck", "t stays at 1", changes.at(lambda t: 1), uses_t, "defect"),
    Dialect(
        "momentum-first",
        "the momentum moves before the weights and enters their step",
        changes.momentum_first,
        is_stem("lion"),
        "defect",
    ),
    Dialect(
        "slow-mean-corrected", "the slow mean is corrected too", changes.corrected_slow, is_stem("ademamix"), "defect"
    ),
    Dialect(
        "ascent", "it climbs: the step goes along the gradient", changes.backward, lambda rule, hyper: True, "defect"
    ),
]


def every() -> list[Dialect]:
    """All of them: the records' options first, then options that are ignored, then the rest."""
    out = []
    for id, name, value, says in OPTIONS:
        around, when = option(name, value)
        out.append(Dialect(id, says, around, both(when, lambda r, h, n=name, v=value: known(r, n, v))))  # type: ignore[misc]
    for id, name, value, says in IGNORED:
        around, _ = option(name, value)
        out.append(Dialect(id, says, around, has(name), "defect"))
    return out + FURTHER
