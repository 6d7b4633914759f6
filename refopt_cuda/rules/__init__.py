"""The rules as scalar forms: one element in, one element out, over an arithmetic that the back end supplies.

A rule module holds

SCALARS             names of the float32 row that a step reads, in order; the `.cuh` functor's struct has the same
STATES              name and "never negative" of each state, in order, and the option that it is kept under, if any
OPTIONS             what is decided when a kernel is compiled: {name: choices}; choices name a dialect, or are booleans,
                    which say whether a hyper-parameter of that name is on. Left out where there is nothing to decide.
scalars(t, **hyper) the row of step t
make(o, **options)  `step(p, g, x, s) -> (p, x)` over the arithmetic `o`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from inspect import signature
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from refopt_cuda.rules import adagrad, adam, adamw, ademamix, lion, rmsprop, schedule_free, sgd, signum

__all__ = ["APART", "RULES", "Form", "form_of", "forms", "hypers", "module", "named", "row"]

RULES: dict[str, ModuleType] = {
    "sgd": sgd,
    "adam": adam,
    "adamw": adamw,
    "lion": lion,
    "rmsprop": rmsprop,
    "adagrad": adagrad,
    "signum": signum,
    "ademamix": ademamix,
}
APART: dict[str, ModuleType] = {"schedule_free": schedule_free}
"""Rules with kernels whose rows depend on the steps before: a class of their own carries that along."""


def module(stem: str) -> ModuleType:
    """The scalar forms of a rule."""
    return RULES[stem] if stem in RULES else APART[stem]


class Form(NamedTuple):
    """One kernel of a rule: its stem, and a choice for each of its options in their order."""

    stem: str
    choices: tuple[bool | str, ...] = ()

    @property
    def options(self) -> dict[str, bool | str]:
        """The choices by name."""
        return dict(zip(_options(self.stem), self.choices, strict=True))

    @property
    def states(self) -> tuple[tuple[str, bool], ...]:
        """Name and "never negative" of each state that this form keeps, in order."""
        on = self.options
        return tuple((s[0], s[1]) for s in module(self.stem).STATES if len(s) == 2 or on[s[2]])

    @property
    def name(self) -> str:
        """A word for files and for tests: "adamw_amsgrad_after_outside"."""
        words = [(n if c else f"no_{n}") if isinstance(c, bool) else c for n, c in self.options.items()]
        return "_".join([self.stem, *words])

    @property
    def width(self) -> int:
        """How many scalars a step reads."""
        return len(module(self.stem).SCALARS)

    @property
    def source(self) -> str:
        """Where the functor is."""
        return f"rules/{self.stem}.cuh"

    def make(self, o: Any) -> Callable:
        """`step(p, g, x, s) -> (p, x)` of this form over the arithmetic `o`."""
        return module(self.stem).make(o, **self.options)


def _options(stem: str) -> dict[str, tuple[bool | str, ...]]:
    return getattr(module(stem), "OPTIONS", {})


@cache
def forms(stem: str) -> tuple[Form, ...]:
    """Every form of a rule, the plainest first."""
    return tuple(Form(stem, choices) for choices in product(*_options(stem).values()))


@cache
def named(rule: str | Form, count: int) -> Form | None:
    """A form as it is; for a stem its plainest form with `count` states, None if it has none."""
    every = [rule] if isinstance(rule, Form) else forms(rule)
    return next((form for form in every if len(form.states) == count), None)


def form_of(stem: str, hyper: Mapping[str, Any]) -> Form:
    """The form that these hyper-parameters ask for; what is not among them is at its first choice."""
    choices = []
    for name, known in _options(stem).items():
        value = hyper.get(name, known[0])
        choices.append(value if isinstance(value, str) else bool(value))
    return Form(stem, tuple(choices))


@cache
def _in_row(stem: str) -> frozenset[str]:
    return frozenset(signature(module(stem).scalars).parameters) - {"t"}


def hypers(stem: str) -> frozenset[str]:
    """The hyper-parameters that a rule's kernels know."""
    return (_in_row(stem) | _options(stem).keys()) - {"gscale", "maximize"}


def row(stem: str, t: int, hyper: Mapping[str, Any]) -> np.ndarray:
    """The float32 row of step `t` (counted from 1), in the order of `SCALARS`."""
    return module(stem).scalars(t, **{name: value for name, value in hyper.items() if name in _in_row(stem)})
