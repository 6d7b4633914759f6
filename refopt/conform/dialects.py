"""What else it could be: documented dialects, and mistakes that have been made before, as changes to a rule's step.

A dialect is an option of a rule, or another rule; a defect is what no documentation asks for. Each is tried alone, then
two at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from refopt import rules
from refopt.conform.measure import Step, bf16
from refopt.conform.record import oracle
from refopt.spec import Array, Rule

f32 = np.float32
Hyper = dict[str, Any]
Make = Callable[[Rule, Hyper], Step]
"""What makes the step of a rule with hyper-parameters."""
Around = Callable[[Make, Rule, Hyper], Step]
"""A change: the step of a rule, given what makes steps."""


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


def plain(rule: Rule, hyper: Hyper) -> Step:
    return oracle(rule, hyper)


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


class Narrow(float):
    """A beta whose 1 - beta is computed in float32, and no other use of it."""

    def __rsub__(self, other: Any) -> float:
        return float(f32(other) - f32(self))


class Power(float):
    """beta^t whose distance from 1 is taken in float32."""

    def __mul__(self, other: Any) -> Power:
        return Power(float(self) * float(other))

    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> float:
        return float(f32(other) - f32(float(self)))


class Corrected(float):
    """A beta in float32 whose powers are, and whose own 1 - beta is not."""

    def __mul__(self, other: Any) -> Power:
        return Power(float(f32(float(self))) * float(f32(float(other))))

    __rmul__ = __mul__


def corrections_in_f32(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {n: Corrected(hyper[n]) for n in ("beta1", "beta2")})


class Single(Corrected):
    """A beta in float32 in all that is taken from it: its own 1 - beta, its powers, and theirs."""

    def __rsub__(self, other: Any) -> float:
        return float(f32(other) - f32(float(self)))


def scalars_in_f32(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {n: Single(hyper[n]) for n in betas_of(hyper)})


LOGARITHM = 2.0**-21
"""How far a GPU's fast base-2 logarithm may be off near 1, where powers of beta begin."""


def by_fast_powers(hyper: Hyper, t: int) -> float:
    """The share of a step that corrections are off by where beta^t is exp2(t log2(beta)) in a GPU's fast arithmetic."""
    shares = []
    for n in ("beta1", "beta2"):
        power = hyper[n] ** t
        shares.append(power * (t * LOGARITHM + 2.0**-22) / (1.0 - power))
    return shares[0] + shares[1] / 2


def betas_of(hyper: Hyper) -> list[str]:
    return [n for n in ("beta1", "beta2", "beta3", "beta", "alpha", "momentum") if isinstance(hyper.get(n), float)]


def loses(beta: float) -> bool:
    """Whether 1 - beta in float32 is off by more than roundings can be."""
    return abs(float(f32(1) - f32(beta)) - (1.0 - beta)) > 32 * float(np.spacing(f32(1.0 - beta)))


def narrow(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {n: Narrow(hyper[n]) for n in betas_of(hyper)})


def swapped(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {"beta1": hyper["beta2"], "beta2": hyper["beta1"]})


def at(shift: Callable[[int], int]) -> Around:
    """The same step at another t."""

    def around(make: Make, rule: Rule, hyper: Hyper) -> Step:
        step = make(rule, hyper)
        return lambda p, g, state, t: step(p, g, state, max(shift(t), 1))

    return around


def uses_t(rule: Rule, hyper: Hyper) -> bool:
    return rule.stem in ("adam", "adamw", "ademamix", "lamb", "adafactor", "adam_mini", "galore", "apollo") and (
        hyper.get("bias_correction", True)
    )


def corrects(rule: Rule, hyper: Hyper) -> bool:
    stems = ("adam", "adamw", "ademamix", "lamb", "schedule_free")
    return rule.stem in stems and hyper.get("bias_correction", True)


def by_gradient(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """Decay that goes through the gradient, whatever the rule says."""
    step, wd = make(rule, hyper | {"wd": 0.0}), f32(hyper["wd"])
    return lambda p, g, state, t: step(p, g + wd * p, state, t)


def not_coupled(rule: Rule, hyper: Hyper) -> bool:
    return has("wd")(rule, hyper) and not known(rule, "decay", "coupled") and rule.stem not in COUPLED


COUPLED = ("rmsprop", "adagrad", "lars", "lamb", "schedule_free")


def decoupled(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """Decay that shrinks the old weights, whatever the rule says."""
    step, keep = make(rule, hyper | {"wd": 0.0}), f32(1.0 - hyper["lr"] * hyper["wd"])
    return lambda p, g, state, t: step(p * keep, g, state, t)


def unscaled(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {"wd": hyper["wd"] / hyper["lr"]})


def kept_in_bf16(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """States rounded to bfloat16 after every step."""
    step = make(rule, hyper)

    def rounded(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        p, new = step(p, g, state, t)
        return p, {n: bf16(x) if x.dtype == f32 else x for n, x in new.items()}

    return rounded


def debiased(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """m and v are kept corrected: beta becomes (beta - beta^t) / (1 - beta^t), and nothing is corrected later."""

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        hat = {n: (hyper[n] - hyper[n] ** t) / (1.0 - hyper[n] ** t) for n in ("beta1", "beta2")}
        return make(rule, hyper | hat | {"bias_correction": False})(p, g, state, t)

    return step


def sign_of_one(beta: str) -> Around:
    """Signum in Lion's place: one beta for both mixtures, the step along the sign of the new momentum."""

    def around(make: Make, rule: Rule, hyper: Hyper) -> Step:
        return make(rules.signum, {"lr": hyper["lr"], "beta": hyper[beta], "wd": hyper["wd"]})

    return around


def momentum_first(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """Lion whose momentum moves before the weights do, and enters their step."""
    step, b2, omb2 = make(rule, hyper), f32(hyper["beta2"]), f32(1.0 - hyper["beta2"])

    def early(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        m = b2 * state["m"] + omb2 * g
        return step(p, g, {"m": m}, t)[0], {"m": m}

    return early


def damped_first(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """SGD whose buffer starts at zero and takes its first gradient damped."""
    step = make(rule, hyper)
    return lambda p, g, state, t: step(p, g, state, max(t, 2))


def by_lr(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """Adafactor whose decay is lr wd, without the size of the weights."""

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        rho = hyper["lr"] if hyper.get("lr") is not None else min(1e-2, 1.0 / t**0.5)
        new, states = make(rule, hyper | {"wd": 0.0})(p, g, state, t)
        return (new - p) + p * f32(1.0 - rho * hyper["wd"]), states

    return step


def corrected_slow(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """AdEMAMix that divides the slow mean by 1 - beta3^t too."""

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        return make(rule, hyper | {"alpha": hyper["alpha"] / (1.0 - hyper["beta3"] ** t)})(p, g, state, t)

    return step


def cut_lamb(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """LAMB's clip variant as bitsandbytes has it on a CPU: another norm, and decay before the step."""
    keep = f32(1.0 - hyper["lr"] * hyper["wd"])

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        longer = (1.0 - hyper["beta1"] ** t) / (1.0 - hyper["beta2"] ** t) ** 0.5
        now = hyper | {"variant": "clip", "wd": 0.0, "max_unorm": hyper["max_unorm"] / longer}
        new, states = make(rule, now)(p, g, state, t)
        return p * keep + (new - p), states

    return step


def cut_lars(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """LARS as bitsandbytes has it on a CPU: momentum whose step is cut to max_unorm of the weights' norm."""
    mu, wd = f32(hyper["momentum"]), f32(hyper["wd"])

    def step(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        v = mu * state["v"] + (g + wd * p)
        size, most = float(np.linalg.norm(v.astype(np.float64))), float(np.linalg.norm(p.astype(np.float64)))
        q = min(1.0, hyper["max_unorm"] * most / size) if size else 1.0
        return p - f32(hyper["lr"] * q) * v, {"v": v}

    return step


def of_steps(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """A momentum buffer that holds what is added to the weights; that of LARS has lr in it as it is."""
    step, name = make(rule, hyper), "v" if rule.stem == "lars" else "buf"
    lr = f32(-1.0 if rule.stem == "lars" else -hyper["lr"])

    def added(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        p, new = step(p, g, state | {name: state[name] / lr}, t)
        return p, new | {name: new[name] * lr}

    return added


def damped_by_momentum(make: Make, rule: Rule, hyper: Hyper) -> Step:
    return make(rule, hyper | {"dampening": hyper["momentum"]})


def backward(make: Make, rule: Rule, hyper: Hyper) -> Step:
    step = make(rule, hyper)
    return lambda p, g, state, t: step(p, -g, state, t)


def accumulated(make: Make, rule: Rule, hyper: Hyper) -> Step:
    """RMSprop or Adagrad whose decay enters the squares and not the step."""
    step, state_of = make(rule, hyper), "v" if rule.stem == "rmsprop" else "s"

    def raw(p: Array, g: Array, state: dict[str, Array], t: int) -> tuple[Array, dict[str, Array]]:
        states = step(p, g, state, t)[1]
        lr = f32(hyper["lr"] / (1.0 + (t - 1) * hyper.get("lr_decay", 0.0)))
        return p - lr * (g / (np.sqrt(states[state_of]) + f32(hyper["eps"]))), states

    return raw


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


FURTHER = [
    Dialect(
        "debiased-states",
        "m and v are stored corrected: the betas change with t instead (optimi)",
        debiased,
        lambda rule, hyper: rule.stem in ("adam", "adamw") and not hyper["amsgrad"] and hyper["bias_correction"],
    ),
    Dialect(
        "state-bf16",
        "states are rounded to bfloat16 after each step",
        kept_in_bf16,
        lambda rule, hyper: True,
        "defect",
        2.0**16,
    ),
    Dialect(
        "arithmetic-bf16",
        "states are bfloat16, and so is the arithmetic between the roundings",
        kept_in_bf16,
        lambda rule, hyper: True,
        "defect",
        2.0**16 * 8,
    ),
    Dialect("decay-coupled", "weight decay is coupled: g + wd p", by_gradient, not_coupled),
    Dialect("decay-decoupled", "weight decay is decoupled: p (1 - lr wd), not g + wd p", decoupled, coupled_now),
    Dialect("decay-without-lr", "weights shrink by wd, not by lr wd", unscaled, decays_by_lr),
    Dialect(
        "decay-by-lr",
        "weights shrink by lr wd, without the size of the weights",
        by_lr,
        lambda rule, hyper: rule.stem == "adafactor" and has("wd")(rule, hyper),
    ),
    Dialect(
        "variant-clip-bitsandbytes",
        "the step is only cut where it is long, measured before the bias correction, after the old weights have shrunk",
        cut_lamb,
        is_stem("lamb"),
    ),
    Dialect(
        "variant-clip-bitsandbytes",
        "the step is only cut where it is long, measured with its decay (bitsandbytes)",
        cut_lars,
        is_stem("lars"),
    ),
    Dialect(
        "buffer-of-steps",
        "the buffer holds minus the step, lr in it, and is added to the weights (optax)",
        of_steps,
        lambda rule, hyper: rule.stem in ("lars", "rmsprop") and has("momentum")(rule, hyper),
    ),
    Dialect(
        "dampening-is-a-switch",
        "dampening is a switch: any value but 0 means dampening = momentum (optimi)",
        damped_by_momentum,
        lambda rule, hyper: rule.stem == "sgd" and has("momentum", "dampening")(rule, hyper),
    ),
    Dialect("signum-beta1", "one beta for both mixtures: Signum with beta1", sign_of_one("beta1"), is_stem("lion")),
    Dialect("signum-beta2", "one beta for both mixtures: Signum with beta2", sign_of_one("beta2"), is_stem("lion")),
    Dialect(
        "first-step-damped",
        "dampening applies to the first gradient too, to a buffer that begins at zero",
        damped_first,
        lambda rule, hyper: rule.stem == "sgd" and has("momentum", "dampening")(rule, hyper),
    ),
    Dialect(
        "one-minus-beta-f32",
        "1 - beta is computed in float32, where it has lost digits",
        narrow,
        lambda rule, hyper: any(loses(hyper[n]) for n in betas_of(hyper)),
        "defect",
    ),
    Dialect(
        "corrections-f32",
        "the bias corrections 1 - beta^t are computed in float32, where they have lost digits",
        corrections_in_f32,
        corrects,
        "defect",
    ),
    Dialect(
        "scalars-f32",
        "1 - beta and the bias corrections are computed in float32, the powers by a GPU's fast arithmetic or as near",
        scalars_in_f32,
        lambda rule, hyper: corrects(rule, hyper) and any(loses(hyper[n]) for n in betas_of(hyper)),
        "defect",
        slack=by_fast_powers,
    ),
    Dialect(
        "decay-skips-the-step",
        "weight decay enters the mean of squares, not the step: it slows weights down and shrinks none",
        accumulated,
        squares_alone(momentum=False),
        "defect",
    ),
    Dialect(
        "momentum-ignored+decay-skips-the-step",
        "momentum is accepted and ignored, and weight decay enters the mean of squares, not the step",
        accumulated,
        squares_alone(momentum=True),
        "defect",
    ),
    Dialect(
        "betas-swapped", "beta1 and beta2 are swapped", swapped, lambda rule, hyper: "beta2" in hyper, "defect"
    ),
    Dialect("t-ahead", "t is one ahead", at(lambda t: t + 1), uses_t, "defect"),
    Dialect("t-behind", "t is one behind", at(lambda t: t - 1), uses_t, "defect"),
    Dialect("t-stuck", "t stays at 1", at(lambda t: 1), uses_t, "defect"),
    Dialect(
        "momentum-first", "the momentum moves before the weights and enters their step", momentum_first,
        is_stem("lion"), "defect",
    ),
    Dialect("slow-mean-corrected", "the slow mean is corrected too", corrected_slow, is_stem("ademamix"), "defect"),
    Dialect("ascent", "it climbs: the step goes along the gradient", backward, lambda rule, hyper: True, "defect"),
]  # fmt: skip


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


def both(a: Callable[[Rule, Hyper], bool], b: Callable[[Rule, Hyper], bool]) -> Callable[[Rule, Hyper], bool]:
    return lambda rule, hyper: a(rule, hyper) and b(rule, hyper)


class Candidate(NamedTuple):
    """A step with none, one or two changes."""

    changes: tuple[Dialect, ...]
    step: Step

    @property
    def id(self) -> str:
        return "+".join(d.id for d in self.changes) or "canonical"

    @property
    def says(self) -> str:
        return "; ".join(d.says for d in self.changes) or "the reference's equations"

    @property
    def loose(self) -> float:
        """Ulps that states may be apart beside those of the rule."""
        return max((d.loose for d in self.changes), default=0.0)

    def slack(self, hyper: Hyper, t: int) -> float:
        """The share of step t's length that approximations may take or add."""
        return max((d.slack(hyper, t) for d in self.changes if d.slack), default=0.0)

    @property
    def freely(self) -> float:
        """Ulps that weights may be apart too, where the arithmetic itself has few bits."""
        return max((d.loose for d in self.changes if d.id == "arithmetic-bf16"), default=0.0)


def made(rule: Rule, hyper: Hyper, changes: tuple[Dialect, ...]) -> Step:
    """The step of a rule under changes, the last one outermost."""
    make: Make = plain
    for d in changes:
        make = (lambda inner, around: lambda r, h: around(inner, r, h))(make, d.around)
    return make(rule, hyper)


def candidates(rule: Rule, hyper: Hyper, least: int = 1, most: int = 2) -> Iterator[Candidate]:
    """Every step with `least` to `most` changes that fit the rule; those that the record refuses are left out."""
    full = rule.check("conform", hyper)
    fitting = [d for d in every() if d.when(rule, full) and not moot(d.id, rule, full)]
    for d in fitting if least <= 1 else ():
        yield from tried(rule, full, (d,))
    for i, a in enumerate(fitting if most >= 2 else ()):
        for b in fitting[i + 1 :]:
            if topic(a) != topic(b):
                yield from tried(rule, full, (a, b))


def moot(id: str, rule: Rule, hyper: Hyper) -> bool:
    """Changes that change nothing under these hyper-parameters."""
    if id in ("decay-decoupled", "lr-inside") and rule.stem == "sgd":
        return not hyper["momentum"]  # without a buffer lr multiplies all of it, either way
    if id.endswith("-bf16"):
        return not rule.states_for(**hyper)
    if id == "one-minus-beta-f32":
        return rule.tier == "T2"  # products of matrices differ by more
    if id == "variant-apex":
        return bool(hyper["wd"])
    return rule.stem == "muon" and id.startswith("eps-")  # the norm of a matrix is far from any eps


def topic(d: Dialect) -> str:
    """Changes of one thing are not tried together."""
    words = {"signum": "decay-rule", "arithmetic": "bf16", "state": "bf16", "bias": "bias", "no": "bias"}
    first = d.id.split("-")[0]
    return words.get(first, first)


def tried(rule: Rule, full: Hyper, changes: tuple[Dialect, ...]) -> Iterator[Candidate]:
    try:
        yield Candidate(changes, made(rule, full, changes))
    except (ValueError, TypeError, KeyError):
        return
