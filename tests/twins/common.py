"""What the twins are held against: the oracle's step on the same bits, and inputs that are hard on arithmetic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from refopt import Optimizer, codecs
from refopt.spec import Box
from refopt_cuda.codecs import named
from refopt_cuda.random import step_word
from refopt_cuda.rules import Form, form_of, row
from tests.cases import RULES as RULE_CASES
from tests.kernels.gpu_step import TO_WORDS, narrow, widen

HYPERS: dict[str, dict[str, Any]] = {}
"""Of each rule's plainest case: no value here makes two rules, or two orders of the same rule, coincide."""
for case in RULE_CASES:
    HYPERS.setdefault(case.stem if case.states else "", case.hyper)

BF16 = ml_dtypes.bfloat16
SEED, NUMBER = 5, 2
"""Of the random bits: a seed, and which of the parameters is the one that is stepped."""

SHAPES = st.sampled_from(
    [(), (0,), (3, 0), (1,), (2,), (31,), (255,), (256,), (257,), (4095,), (4096,), (4097,)]
    + [(5, 3), (40, 15), (40, 16), (7, 100), (3, 256), (3, 300), (2, 3, 130), (2, 2101)]
)


@st.composite
def inputs(draw: st.DrawFn, shapes: st.SearchStrategy = SHAPES) -> tuple[np.ndarray, list[np.ndarray]]:
    """Float32 weights and three gradients: log-uniform, zeros, an outlier, sometimes NaN, Inf, subnormals."""
    shape = draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low = draw(st.floats(-12, 6))
    high = draw(st.floats(low, 6))
    specials = draw(st.sampled_from(["none", "none", "zeros", "subnormal", "nan", "inf", "all zero"]))

    def array(kind: str) -> np.ndarray:
        x = rng.choice([-1.0, 1.0], shape) * 10 ** (low + (high - low) * rng.random(shape))
        x = np.asarray(x, np.float32)
        _plant(x.reshape(-1), kind, rng)
        return x

    return array("none"), [array(specials), array("outlier"), array(specials)]


def _plant(flat: np.ndarray, kind: str, rng: np.random.Generator) -> None:
    if flat.size == 0 or kind == "none":
        return
    if kind == "all zero":
        flat[:] = 0
    elif kind in ("zeros", "subnormal"):
        some = rng.random(flat.size) < 0.3
        flat[some] = -0.0 if kind == "zeros" else 3e-42
    elif kind == "outlier":
        flat[rng.integers(flat.size, size=-(-flat.size // 256))] *= np.float32(1e4)
    else:
        flat[rng.integers(flat.size)] = np.nan if kind == "nan" else -np.inf


def log_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Magnitudes from 1e-12 to 1e4, and zeros."""
    x = rng.choice([-1.0, 1.0], shape) * 10 ** rng.uniform(-12, 4, shape)
    return np.asarray(x * (rng.random(shape) > 0.05), np.float32)


class Case(NamedTuple):
    """One combination of all that a kernel is made for, by name: a rule with hyper-parameters, a codec a state, formats
    of weights and gradients; and the block length, one for all states or one a state."""

    stem: str
    codecs: tuple[str, ...]
    weight: str = "float32"
    grad: str = "float32"
    block: int | tuple[int, ...] = 64
    hyper: dict[str, Any] | None = None

    @property
    def hypers(self) -> dict[str, Any]:
        """The hyper-parameters, by default those of the rule's plainest case with states."""
        return HYPERS[self.stem] if self.hyper is None else self.hyper

    @property
    def form(self) -> Form:
        return form_of(self.stem, Optimizer(self.stem, **self.hypers).hyper)

    @property
    def visible(self) -> str:
        """The number format of the weights that are seen."""
        return self.weight if self.weight in TO_WORDS else "bfloat16"

    def optimizer(self) -> Optimizer:
        """The oracle with these codecs."""
        states, blocks = self.form.states, self.block
        blocks = blocks if isinstance(blocks, tuple) else (blocks,) * len(states)
        given = {name: record(c, b) for (name, _), c, b in zip(states, self.codecs, blocks, strict=True)}
        if self.weight not in TO_WORDS:
            given["p"] = record(self.weight)
        return Optimizer(self.stem, given, seed=SEED, **self.hypers)

    def __str__(self) -> str:
        parts = [self.form.name, "+".join(self.codecs) or "none", self.weight, self.grad]
        return "-".join([*parts, str(self.block).strip("()").replace(", ", "+")])


def record(name: str, block: int | None = None) -> Any:
    """The oracle's codec for a name of `refopt_cuda.codecs`: "dynamic8", "fp8.e5m2", "bf16_ecc.16"."""
    form = named(name)
    found, signed = codecs.CODECS[form.stem], name.partition(".")[2]
    options = {k: v for k, v in form.options.items() if k != "signed" or signed in ("signed", "unsigned")}
    return found(**options, block=block, layout=None) if found.scope == "block" else found(**options)


class Compared(NamedTuple):
    """One array after a step: a twin's and the oracle's, all NaNs being one value."""

    what: str
    have: np.ndarray
    want: np.ndarray

    @property
    def differ(self) -> int:
        """How many words do."""
        return int((words(self.have) != words(self.want)).sum())


def compared(
    case: Case, step: Callable, p: np.ndarray, gradients: Sequence[np.ndarray], t0: int = 0
) -> Iterator[Compared]:
    """A step of a twin for each gradient, each from the oracle's state, so that no difference can hide in another.

    step    `step_host.step`, or what takes the same arguments
    """
    opt, form, others = case.optimizer(), case.form, [np.ones(1, np.float32)] * NUMBER
    weight = case.weight if case.weight not in TO_WORDS else None
    p = narrow(np.asarray(p), case.visible)
    states = opt.init([*others, widen(p, case.visible)])
    for state in states:
        state["t"] = t0
    for given in gradients:
        g = narrow(np.asarray(given), case.grad)
        mine, state = p.copy(), states[NUMBER]
        kept, rest = [arrays_of(state[name]) for name, _ in form.states], beside(state)
        t = state["t"] + 1
        s = row(case.stem, t, {**opt.hyper, **{k: v for k, v in case.hypers.items() if k in ("gscale", "maximize")}})
        step(form, case.codecs, _seen(mine, case.visible), _seen(g, case.grad), kept, p.shape, case.block, s,
             weight=weight, rest=rest, random=(step_word(SEED, t), NUMBER))  # fmt: skip
        new, states = opt.step([*others, widen(p, case.visible)], [*others, widen(g, case.grad)], states)
        p, state = narrow(new[NUMBER], case.visible), states[NUMBER]
        yield Compared(f"step {t}: p", numbers(mine, case.visible), numbers(p, case.visible))
        if rest is not None:
            view = BF16 if case.weight == "bf16_kahan" else rest.dtype
            yield Compared(f"step {t}: beside p", rest.view(view), beside(state).view(view))
        for (name, _), codec, have in zip(form.states, case.codecs, kept, strict=True):
            for key, want in arrays_of(state[name]).items():
                view = viewed(codec, key, want)
                yield Compared(f"step {t}: {name}.{key}", have[key].view(view), want.view(view))


def check(case: Case, step: Callable, p: np.ndarray, gradients: Sequence[np.ndarray], t0: int = 0) -> None:
    """Raise AssertionError where a word of a twin's step is not the oracle's."""
    for one in compared(case, step, p, gradients, t0):
        assert_same_bits(one.have, one.want, f"{case}: {one.what}")


def arrays_of(state: Any) -> dict[str, np.ndarray]:
    """A copy of a state's arrays, as the twins take them."""
    return copy.deepcopy(state.arrays if isinstance(state, Box) else {"codes": state})


def beside(state: dict[str, Any]) -> np.ndarray | None:
    """A copy of what the oracle keeps beside the weights."""
    return next(iter(state["p"].arrays.values())).copy() if isinstance(state.get("p"), Box) else None


def viewed(codec: str, key: str, a: np.ndarray) -> Any:
    """The dtype as which an array of a state is compared: words of bfloat16 as numbers, for their NaNs."""
    return BF16 if codec == "bf16" or (key, a.dtype) == ("scales", np.uint16) else a.dtype


def _seen(a: np.ndarray, number: str) -> np.ndarray:
    """Words as a caller hands them over: float32 and float16 as such."""
    return a if number == "bfloat16" else a.view(number)


def numbers(a: np.ndarray, number: str) -> np.ndarray:
    """Words as the numbers that they are, for their NaNs."""
    return a.view(BF16 if number == "bfloat16" else number)


def words(a: np.ndarray) -> np.ndarray:
    """The array's bits as unsigned integers, every NaN as one value."""
    bits = a.reshape(-1).view(f"u{a.dtype.itemsize}").copy()
    if a.dtype.kind == "f" or a.dtype == BF16:
        bits[np.isnan(a.reshape(-1))] = np.iinfo(bits.dtype).max
    return bits


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str) -> None:
    assert (got.dtype, got.size) == (want.dtype, want.size), f"{what}: {got.dtype}{got.shape} for {want.shape}"
    differ = np.flatnonzero(words(got) != words(want))
    if differ.size:
        i = differ[0]
        raise AssertionError(
            f"{what}: {differ.size} of {want.size} differ, first at {i}: "
            f"{got.reshape(-1)[i]!r} for {want.reshape(-1)[i]!r}"
        )
