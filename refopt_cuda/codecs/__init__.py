"""The codecs as scalar forms, over an arithmetic that the back end supplies.

An element codec's module holds `DTYPE` and `make(o) -> Element`. A block codec's holds

OPTIONS                 what is decided when a kernel is compiled: {name: choices}, the first being the default
BITS                    of a code; two of 4 bits share a byte
dtype(**options)        of the array of codes; scale_dtype(**options) of the scales
tables(**options)       (values, words) that the `.cuh` functor looks up in shared memory
make(o, **options)      a `Block` (`refopt_cuda.codecs.forms`)

and a format of weights `OPTIONS`, `RANDOM` (whether it draws bits), `rest_dtype(**options)` (of what lies beside the
bfloat16 words, None for nothing) and `make(o, **options) -> Weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

from refopt_cuda.codecs import (
    bf16,
    bf16_ecc,
    bf16_kahan,
    bf16_rem16,
    bf16_sr,
    compand8,
    dynamic8,
    f32,
    fp4,
    fp8,
    int8_linear,
    nf4,
    q4,
)

__all__ = ["BLOCK", "CODECS", "ELEMENT", "FROZEN", "STATES", "WEIGHTS", "Form", "form_of", "forms", "named"]

ELEMENT: dict[str, ModuleType] = {"f32": f32, "bf16": bf16}
BLOCK: dict[str, ModuleType] = {
    "int8_linear": int8_linear,
    "dynamic8": dynamic8,
    "fp8": fp8,
    "q4": q4,
    "compand8": compand8,
}
FROZEN: dict[str, ModuleType] = {"nf4": nf4, "fp4": fp4}
"""What weights that are not trained are kept in: blocks of the flattened tensor."""
WEIGHTS: dict[str, ModuleType] = {
    "bf16_sr": bf16_sr,
    "bf16_kahan": bf16_kahan,
    "bf16_rem16": bf16_rem16,
    "bf16_ecc": bf16_ecc,
}
STATES: dict[str, ModuleType] = {**ELEMENT, **BLOCK}
"""What a state can be kept in."""
CODECS: dict[str, ModuleType] = {**STATES, **WEIGHTS, **FROZEN}


class Form(NamedTuple):
    """One form of a codec: its stem, and a choice for each of its options in their order."""

    stem: str
    choices: tuple[bool | int | str, ...] = ()

    @property
    def options(self) -> dict[str, bool | int | str]:
        """The choices by name."""
        return dict(zip(_options(self.stem), self.choices, strict=True))

    @property
    def name(self) -> str:
        """A word for files and for tests: "dynamic8_unsigned", "fp8_e5m2"."""
        return "_".join([self.stem, *(_word(name, c) for name, c in self.options.items())])

    @property
    def scaled(self) -> bool:
        """Whether blocks have scales."""
        return self.stem in BLOCK or self.stem in FROZEN

    @property
    def module(self) -> ModuleType:
        return CODECS[self.stem]

    def make(self, o: Any) -> Any:
        """This form's functions over the arithmetic `o`."""
        return self.module.make(o, **self.options)


def _options(stem: str) -> dict[str, tuple[bool | int | str, ...]]:
    return getattr(CODECS[stem], "OPTIONS", {})


def _word(name: str, choice: bool | int | str) -> str:
    return str(choice) if not isinstance(choice, bool) else name if choice else f"un{name}"


@cache
def forms(stem: str) -> tuple[Form, ...]:
    """Every form of a codec, the default first."""
    return tuple(Form(stem, choices) for choices in product(*_options(stem).values()))


def form_of(stem: str, options: Mapping[str, Any]) -> Form:
    """The form with these options; what is not among them is at its first choice."""
    return Form(stem, tuple(options.get(name, known[0]) for name, known in _options(stem).items()))


@cache
def named(text: str, nonnegative: bool = False) -> Form:
    """The form that words name: "dynamic8", "dynamic8.unsigned", "fp8.e5m2". A state that is never negative takes the
    unsigned table where there is one, unless a word says otherwise. ValueError for words that name nothing."""
    stem, *words = text.split(".")
    known = _options(stem) if stem in CODECS else {}
    options: dict[str, Any] = {"signed": not nonnegative} if "signed" in known else {}
    for word in words:
        meant = [(name, c) for name, choices in known.items() for c in choices if _word(name, c) == word]
        options.update(meant[:1] or {"": word})
    if stem not in CODECS or "" in options:
        raise ValueError(f"unknown codec {text!r}; there are {', '.join(CODECS)}")
    return form_of(stem, options)
