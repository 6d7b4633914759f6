"""Every refusal as data: the call, the error, the words that name what is wrong; nothing changes on a raise."""

from __future__ import annotations

import builtins
import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.bits import same_bits, same_state
from tests.strategies import f32


class Refusal(NamedTuple):
    label: str
    call: Callable[[ModuleType], Any]
    error: str
    words: str


def building(label: str, error: str, words: str, *args: Any, **kwargs: Any) -> Refusal:
    return Refusal(label, lambda ref: ref.Optimizer(*args, **kwargs), error, words)


def of_hyper(stem: str, name: str, value: Any, error: str = "ValueError") -> Refusal:
    return building(
        f"{stem}-{name}={value}", error, rf"Optimizer\('{stem}'\): {name} must be .*{value}", stem, **{name: value}
    )


INF, NAN = float("inf"), float("nan")
RULES = ("sgd", "adam", "adamw", "lion")
HYPERS = [
    *(of_hyper(rule, "lr", lr) for rule in RULES for lr in (-1e-3, NAN, INF)),
    *(of_hyper(rule, "wd", wd) for rule in RULES for wd in (-0.1, NAN, INF)),
    *(of_hyper(rule, b, x) for rule in RULES[1:] for b in ("beta1", "beta2") for x in (-0.1, 1.0, 1.5, NAN)),
    *(of_hyper(rule, "eps", eps) for rule in ("adam", "adamw") for eps in (-1e-8, NAN)),
    *(of_hyper("sgd", "momentum", mu) for mu in (-0.1, NAN)),
    of_hyper("adam", "lr", "fast", "TypeError"),
    of_hyper("adam", "lr", None, "TypeError"),
    of_hyper("adam", "beta1", True, "TypeError"),
    of_hyper("sgd", "nesterov", 1, "TypeError"),
    building("nesterov-without-momentum", "ValueError", "nesterov needs momentum", "sgd", nesterov=True),
    building(
        "nesterov-with-dampening", "ValueError", "dampening=0.1", "sgd", nesterov=True, momentum=0.9, dampening=0.1
    ),
    building("unknown-hyper", "TypeError", "lion has no hyper-parameter 'eps'.*beta1", "lion", eps=1e-8),
    building("betas-are-three", "ValueError", r"betas must be \(beta1, beta2\)", "adam", betas=(0.9, 0.99, 0.999)),
    building("betas-are-one", "ValueError", "betas must be", "adam", betas=0.9),
    building("decay-twice", "TypeError", "wd is given twice", "adam", wd=0.1, weight_decay=0.2),
    building("beta-twice", "TypeError", "beta1 is given twice", "adam", betas=(0.9, 0.99), beta1=0.8),
]
RECORDS = [
    building("unknown-rule", "ValueError", "no rule 'adamx'.*did you mean 'adam", "adamx"),
    building("rule-of-another-kind", "TypeError", "a rule is a record or a name.*5", 5),
    building("unknown-codec", "ValueError", "no codec 'dynamic9'.*did you mean 'dynamic8'", "adam", "dynamic9"),
    building("codec-of-another-kind", "TypeError", "a codec is a record or a name.*8", "adam", {"m": 8}),
    building("unknown-place", "ValueError", "no place 'pagd'.*did you mean 'paged'", "adam", None, "pagd"),
    building("unknown-role", "ValueError", "lion has no role 'v'.*p, m", "lion", {"v": "dynamic8"}),
    building("block-codec-for-weights", "ValueError", "weights take an element codec", "adam", {"p": "dynamic8"}),
    building("nonfinite-word", "ValueError", "nonfinite must be 'propagate'.*'ignore'", "adam", nonfinite="ignore"),
    building("gscale", "ValueError", "gscale must be finite", "adam", gscale=NAN),
    Refusal(
        "unsigned-codec-for-m",
        lambda ref: ref.Optimizer("adam", {"m": ref.codecs.dynamic8(signed=False)}),
        "ValueError",
        "m takes either sign",
    ),
    Refusal(
        "blocks-that-do-not-nest",
        lambda ref: ref.Optimizer("adam", {"m": ref.codecs.dynamic8(block=48), "v": ref.codecs.dynamic8(block=64)}),
        "ValueError",
        "48 does not divide",
    ),
    Refusal(
        "layouts-that-differ",
        lambda ref: ref.Optimizer("adam", {"m": ref.codecs.dynamic8(layout="flat"), "v": "dynamic8"}),
        "ValueError",
        "layouts .* differ",
    ),
    Refusal("block=0", lambda ref: ref.codecs.dynamic8(block=0), "ValueError", "block must be .*>= 1, got 0"),
    Refusal("block=2.5", lambda ref: ref.codecs.int8_linear(block=2.5), "ValueError", "block must be .*2.5"),
    Refusal("block-of-bf16", lambda ref: ref.codecs.bf16(block=64), "TypeError", "bf16: no option 'block'"),
    Refusal("layout", lambda ref: ref.codecs.dynamic8(layout="columns"), "ValueError", "layout must be .*'columns'"),
    Refusal("codec-nonfinite", lambda ref: ref.codecs.dynamic8(nonfinite="skip"), "ValueError", "nonfinite must be"),
    Refusal("page_blocks=0", lambda ref: ref.places.paged(page_blocks=0), "ValueError", "page_blocks must be >= 1"),
    Refusal(
        "page_blocks=2.5", lambda ref: ref.places.disk(page_blocks=2.5), "ValueError", "page_blocks must .*got 2.5"
    ),
    Refusal("buffers=0", lambda ref: ref.places.paged(buffers=0), "ValueError", "paged: buffers must be >= 1.*got 0"),
    Refusal("path=3", lambda ref: ref.places.disk(path=3), "TypeError", "disk: path must name a directory, got 3"),
    Refusal("pages-of-host", lambda ref: ref.places.host(page_blocks=3), "TypeError", "no option 'page_blocks'.*none"),
    Refusal("path-of-paged", lambda ref: ref.places.paged(path="x"), "TypeError", "no option 'path'; it takes page_bl"),
    building("disk-without-a-path", "ValueError", r"places.disk needs a directory", "adam", None, "disk"),
    building("delay=2", "ValueError", "delay must be 0 or 1, got 2", "adam", delay=2),
    building("delay=True", "ValueError", "delay must be 0 or 1, got True", "adam", delay=True),
    building("warm=-1", "ValueError", "warm must be whole and >= 0, got -1", "adam", delay=1, warm=-1),
    building("min_size=-1", "ValueError", "min_size must be whole and >= 0, got -1", "adam", min_size=-1),
    building("reads", "ValueError", "reads must be 'fresh' or 'stored', got 'old'", "adam", reads="old"),
    Refusal("encode-float64", lambda ref: ref.codecs.dynamic8.encode(np.zeros(3)), "TypeError", "float32, got float64"),
    Refusal(
        "encode-nan",
        lambda ref: ref.codecs.dynamic8.encode(f32([1, 2, NAN]), block=2, nonfinite="raise"),
        "NonFiniteError",
        r"block 1 \(elements 2 to 2\) holds NaN or Inf",
    ),
    Refusal(
        "encode-negative",
        lambda ref: ref.codecs.int8_linear.encode(f32([1, -2]), signed=False, nonfinite="raise"),
        "ValueError",
        "negative",
    ),
    Refusal(
        "decode-of-another",
        lambda ref: ref.codecs.dynamic8.decode(ref.codecs.int8_linear.encode(f32([1, 2]))),
        "StateError",
        "dynamic8.decode: the box was written by int8_linear",
    ),
    Refusal(
        "init-float64",
        lambda ref: ref.Optimizer("adam").init([f32([1]), np.ones(2)]),
        "TypeError",
        r"params\[1\] must be float32",
    ),
    Refusal(
        "init-a-number", lambda ref: ref.Optimizer("adam").init([1.0]), "TypeError", r"params\[0\] must be an array"
    ),
    Refusal(
        "init-a-set", lambda ref: ref.Optimizer("adam").init({1.0}), "TypeError", "params must be an array, or a list"
    ),
]


@pytest.mark.parametrize("case", HYPERS + RECORDS, ids=lambda c: c.label)
def test_what_cannot_be_built_is_refused_by_name(ref: ModuleType, case: Refusal) -> None:
    kind = getattr(ref, case.error, None) or getattr(builtins, case.error)
    with pytest.raises(kind, match=case.words):
        case.call(ref)


class Step(NamedTuple):
    """A step of two tensors that goes wrong: `change(params, grads, state)` spoils it."""

    label: str
    change: Callable[[ModuleType, list[Any], list[Any], list[Any]], Any]
    error: str
    words: str
    build: dict[str, Any]


def put(where: list[Any], k: int, value: Any) -> None:
    where[k] = value


def spoil(label: str, error: str, words: str, change: Callable[..., Any], **build: Any) -> Step:
    return Step(label, change, error, words, build)


STEPS = [
    spoil("p-float64", "TypeError", r"params\[1\] must be float32", lambda r, p, g, s: put(p, 1, np.ones((2, 3)))),
    spoil("g-float64", "TypeError", r"grads\[1\] must be float32", lambda r, p, g, s: put(g, 1, np.ones((2, 3)))),
    spoil("g-integer", "TypeError", r"grads\[1\] must be .*int64", lambda r, p, g, s: put(g, 1, np.ones((2, 3), int))),
    spoil(
        "g-complex", "TypeError", r"grads\[1\].*complex64", lambda r, p, g, s: put(g, 1, np.ones((2, 3), "complex64"))
    ),
    spoil("g-a-list", "TypeError", r"grads\[1\] must be an array", lambda r, p, g, s: put(g, 1, [1.0, 2.0])),
    spoil("p-None", "TypeError", r"params\[1\] must be an array", lambda r, p, g, s: put(p, 1, None)),
    spoil("g-shape", "ShapeError", r"grads\[1\] has shape \(3, 2\)", lambda r, p, g, s: put(g, 1, g[1].T)),
    spoil("g-broadcasts", "ShapeError", r"grads\[1\] has shape \(3,\)", lambda r, p, g, s: put(g, 1, g[1][0])),
    spoil("one-grad-short", "ShapeError", "2 params, 1 grads and 2 states", lambda r, p, g, s: g.pop()),
    spoil("one-state-short", "ShapeError", "2 params, 2 grads and 1 states", lambda r, p, g, s: s.pop()),
    spoil(
        "g-nan",
        "NonFiniteError",
        r"grads\[1\] holds NaN",
        lambda r, p, g, s: put(g, 1, g[1] * f32(NAN)),
        nonfinite="raise",
    ),
    spoil(
        "g-inf", "NonFiniteError", r"grads\[1\] holds", lambda r, p, g, s: put(g, 1, g[1] * f32(INF)), nonfinite="raise"
    ),
    spoil("other-rule", "StateError", r"state\[1\] has no 'v'", lambda r, p, g, s: s[1].pop("v")),
    spoil("no-t", "StateError", r"state\[1\] has no .*'t'", lambda r, p, g, s: s[1].pop("t")),
    spoil(
        "other-codec",
        "StateError",
        r"state\[1\]\['m'\] is stored as int8_linear",
        lambda r, p, g, s: s[1].update(m=r.codecs.int8_linear.encode(p[1])),
        codecs="dynamic8",
    ),
    spoil(
        "other-block",
        "StateError",
        "block=64",
        lambda r, p, g, s: s[1].update(m=r.codecs.dynamic8.encode(p[1], block=64)),
        codecs="dynamic8",
    ),
    spoil(
        "other-sign",
        "StateError",
        "stored as dynamic8.block=256., this",
        lambda r, p, g, s: s[1].update(v=r.codecs.dynamic8.encode(p[1])),
        codecs="dynamic8",
    ),
    spoil("uncoded", "StateError", "stored as f32", lambda r, p, g, s: s[1].update(m=p[1]), codecs="dynamic8"),
    spoil(
        "coded", "StateError", "stored as dynamic8", lambda r, p, g, s: s[1].update(m=r.codecs.dynamic8.encode(p[1]))
    ),
    spoil("other-shape", "StateError", r"has shape \(3, 2\)", lambda r, p, g, s: s[1].update(m=s[1]["m"].T)),
    spoil("other-dtype", "TypeError", "float32, got float64", lambda r, p, g, s: s[1].update(m=np.ones((2, 3)))),
    spoil(
        "other-code-dtype",
        "TypeError",
        "codes must be uint8, got int64",
        lambda r, p, g, s: s[1]["m"].arrays.update(codes=np.zeros((2, 3), int)),
        codecs="dynamic8",
    ),
]


def snapshot(p: Any, g: Any, s: Any) -> Any:
    return copy.deepcopy((p, g, s))


@pytest.mark.parametrize("case", STEPS, ids=lambda c: c.label)
def test_a_step_that_raises_leaves_everything_unchanged(ref: ModuleType, case: Step) -> None:
    """The first tensor is in order, the second is not: the first must not have moved either."""
    rng = np.random.default_rng(4)
    p = [rng.standard_normal((2, 3)).astype(f32) for _ in range(2)]
    g = [rng.standard_normal((2, 3)).astype(f32) for _ in range(2)]
    opt = ref.Optimizer("adamw", **case.build)
    p, s = opt.step(p, g, opt.init(p))
    case.change(ref, p, g, s)
    before = snapshot(p, g, s)
    kind = getattr(ref, case.error, None) or getattr(builtins, case.error)
    with pytest.raises(kind, match=case.words):
        opt.step(p, g, s)
    for name, now, then in zip(("params", "grads"), (p, g), before[:2], strict=True):
        for k, (a, b) in enumerate(zip(now, then, strict=True)):
            same_bits(a, b, f"{name}[{k}]") if isinstance(a, np.ndarray) else None
    for k, (a, b) in enumerate(zip(s, before[2], strict=True)):
        same_state(a, b, f"state[{k}]")


def test_gradients_of_a_dict_must_have_the_keys_of_the_weights(ref: ModuleType) -> None:
    opt, one = ref.Optimizer("lion"), np.ones(1, f32)
    with pytest.raises(ValueError, match=r"grads has keys \['b', 'c'\], params has \['a', 'b'\]"):
        opt.step({"a": one, "b": one}, {"b": one, "c": one}, opt.init({"a": one, "b": one}))


OUT_OF_RANGE: dict[str, dict[str, list[Any]]] = {
    "rmsprop": {"alpha": [-0.1, 1.0, NAN], "momentum": [-0.1], "eps": [-1e-8]},
    "adagrad": {"init_acc": [-1.0], "lr_decay": [-1.0], "eps": [-1e-8]},
    "signum": {"beta": [-0.1, 1.0]},
    "lars": {"trust": [-1.0], "momentum": [-0.1], "variant": ["apex"]},
    "lamb": {"beta1": [1.0], "beta2": [1.0], "phi_low": [-1.0], "variant": ["optax"]},
    "ademamix": {"alpha": [-1.0], "t_alpha": [0], "t_beta3": [0], "beta3": [1.0]},
    "adafactor": {"beta1": [-0.1, 1.0], "clip": [0.0], "decay_rate": [0.1]},
    "came": {"lr": [0.0], "clip": [0.0], "beta3": [1.0]},
    "adam_mini": {"blocks": ["columns"], "heads": [0]},
    "sm3": {"variant": ["III"], "momentum": [-0.1, 1.0]},
    "muon": {"ns_steps": [-1, 100, 2.5], "momentum": [-0.1, 1.0]},
    "galore": {"rank": [0], "gap": [0], "proj_type": ["up"]},
    "apollo": {"rank": [0], "gap": [0], "proj_type": ["up"], "scale_type": ["row"]},
    "schedule_free": {"warmup": [-1], "beta1": [1.0]},
}


@pytest.mark.parametrize(("stem", "name"), [(s, n) for s, names in OUT_OF_RANGE.items() for n in names])
def test_a_hyper_parameter_out_of_its_range_is_refused_by_name(ref: ModuleType, stem: str, name: str) -> None:
    for value in OUT_OF_RANGE[stem][name]:
        with pytest.raises(ValueError, match=rf"Optimizer\('{stem}'\): {name} must be .*{value}"):
            ref.Optimizer(stem, **{name: value})


@pytest.mark.parametrize("value", [-1e-3, NAN, INF])
@pytest.mark.parametrize("stem", OUT_OF_RANGE)
def test_no_rule_takes_a_rate_or_decay_that_is_negative_or_no_number(ref: ModuleType, stem: str, value: float) -> None:
    further = {"relative_step": False} if stem == "adafactor" else {}
    for name in {"lr", "wd"} & ref.rules.RULES[stem].defaults().keys():
        with pytest.raises(ValueError, match=rf"Optimizer\('{stem}'\): {name} must be .*{value}"):
            ref.Optimizer(stem, **{name: value}, **(further if name == "lr" else {}))
