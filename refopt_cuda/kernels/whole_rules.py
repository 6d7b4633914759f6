"""The rules that see whole tensors: LAMB, LARS, Adafactor, CAME and Adam-mini.

Beside SCALARS and OPTIONS (see `refopt_cuda.rules`) a module holds

WIDE                 names of the float64 row, which what is made of a tensor's sums is computed with
elements(**options)  names of the states of one entry a weight, in order
FACTORS              names of the others: row and column factors in pairs, or one entry a block
passes(**options)    the passes of a step in order, as words: "sums0", "finish0", "update0" ... (kernels/whole.cu)
scalars(t, vector, **hyper)  both rows of step t; `vector`: for a tensor of at most one axis
blocks(shape, **hyper)       how many blocks there are that sums are taken over; by default one
make(o, **options)           the fields of `Steps` over the arithmetic `o`: one element in, one out
finish(r, n, s, w, factor, **options)  NumPy: sums (SUMS, blocks) of blocks of n elements -> four floats a block
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from inspect import signature
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from refopt_cuda.rules import adafactor, adam_mini, came, lamb, lars

__all__ = ["WHOLE", "Form", "Rows", "Steps", "form_of", "forms", "rows"]

WHOLE: dict[str, ModuleType] = {
    "lamb": lamb,
    "lars": lars,
    "adafactor": adafactor,
    "came": came,
    "adam_mini": adam_mini,
}


class Steps(NamedTuple):
    """Scalar functions of one weight, its gradient `g`, its states `x`, `inverse`, the roots of its rank-1 moments, one
    over each, `k`, four floats of its block, `vector`, whether nothing is factored, and the float32 scalars `s`.

    sums(p, g, x, inverse, vector, s) -> (a, b)              what is squared and summed; 0 where there is one sum
    tiles: tile(g, x, inverse, k, s) -> q                    what rows and columns are summed of, a function a pair
    update(p, g, x, inverse, k, vector, s) -> (p, x)
    """

    sums: Callable | None
    tiles: tuple[Callable, ...]
    update: Callable


class Rows(NamedTuple):
    """What a step of one tensor reads: float32 scalars, and those that its sums are finished with, float64."""

    scalars: np.ndarray
    wide: np.ndarray


class Form(NamedTuple):
    """One kernel of a rule: its stem, and a choice for each of its options in their order."""

    stem: str
    choices: tuple[bool | str, ...] = ()

    @property
    def module(self) -> ModuleType:
        return WHOLE[self.stem]

    @property
    def options(self) -> dict[str, bool | str]:
        """The choices by name."""
        return dict(zip(self.module.OPTIONS, self.choices, strict=True))

    @property
    def elements(self) -> tuple[str, ...]:
        """States of one entry a weight, in order."""
        return self.module.elements(**self.options)

    @property
    def factors(self) -> tuple[str, ...]:
        """The other states: row and column factors in pairs, or one entry a block."""
        return tuple(name for name in self.module.FACTORS if name not in self.elements)

    @property
    def factored(self) -> bool:
        return len(self.factors) > 1

    @property
    def passes(self) -> tuple[str, ...]:
        """The launches of a step, in order."""
        return self.module.passes(**self.options)

    @property
    def scalars(self) -> tuple[str, ...]:
        """Names of the float32 row that a step reads, in order."""
        return self.module.SCALARS

    @property
    def sums(self) -> int:
        """How many sums of squares are taken of a tensor."""
        return self.module.sums(**self.options)

    @property
    def name(self) -> str:
        """A word for files and for tests: "adafactor_no_momentum_scaled"."""
        words = [(n if c else f"no_{n}") if isinstance(c, bool) else c for n, c in self.options.items()]
        return "_".join([self.stem, *words])

    @property
    def source(self) -> str:
        """Where the functor is."""
        return f"rules/{self.stem}.cuh"

    @property
    def functor(self) -> str:
        """The C++ type."""
        words = [str(c).lower() if isinstance(c, bool) else str(c).upper() for c in self.choices]
        return f"{self.stem}<{', '.join(words)}>" if words else self.stem

    def make(self, o: Any) -> Steps:
        """The scalar functions of this form over the arithmetic `o`."""
        return Steps(*self.module.make(o, **self.options))

    def blocks(self, shape: tuple[int, ...], hyper: Mapping[str, Any]) -> int:
        """Blocks of a tensor that sums are taken over, one by one."""
        of = getattr(self.module, "blocks", None)
        return of(shape, hyper) if of else 1


@cache
def forms(stem: str) -> tuple[Form, ...]:
    """Every form of a rule, the plainest first."""
    return tuple(Form(stem, choices) for choices in product(*WHOLE[stem].OPTIONS.values()))


def form_of(stem: str, hyper: Mapping[str, Any]) -> Form:
    """The form that these hyper-parameters ask for."""
    return Form(stem, WHOLE[stem].choices(hyper))


@cache
def _in_row(stem: str) -> frozenset[str]:
    return frozenset(signature(WHOLE[stem].scalars).parameters) - {"t", "vector"}


def rows(stem: str, t: int, vector: bool, hyper: Mapping[str, Any]) -> Rows:
    """The rows of step `t` (counted from 1) for a tensor of two axes or more, or for a `vector` of fewer."""
    given = {name: value for name, value in hyper.items() if name in _in_row(stem)}
    return Rows(*WHOLE[stem].scalars(t, vector, **given))
