"""The covering set: kernels in which every pair of rule, codec, format of weights, format of gradients comes together.

All of them would be tens of thousands. Every form of every rule is in one at least, and every block size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

from refopt_cuda.codecs import STATES, WEIGHTS, named
from refopt_cuda.codecs import forms as codec_forms
from refopt_cuda.kernels import build
from refopt_cuda.rules import RULES, Form, forms


def words_of(table: Any, skip: str = "") -> list[str]:
    """The names of all forms of some codecs; forms that differ in one option alone, `skip`, are one."""
    every = [form for stem in table for form in codec_forms(stem)]
    return list(dict.fromkeys(".".join([f.stem, *(str(c) for n, c in f.options.items() if n != skip)]) for f in every))


CODECS = words_of(STATES, "signed")
"""Every codec of a state in every form; the sign is the state's."""
WEIGHT_FORMATS = [*build.NUMBERS, *words_of(WEIGHTS)]


class Case(NamedTuple):
    """One kernel: a form of a rule, a codec for each state, formats of weights and gradients, block and launch rows."""

    form: Form
    codecs: tuple[str, ...]
    weight: str
    grad: str
    block: int
    rows: int

    @property
    def kernel(self) -> build.Kernel:
        coded = tuple(named(c, never) for c, (_, never) in zip(self.codecs, self.form.states, strict=True))
        weight = self.weight if self.weight in build.NUMBERS else named(self.weight)
        return build.Kernel(self.form, coded, weight, self.grad, (self.block,) * len(coded), rows=self.rows)

    def __str__(self) -> str:
        return "-".join(
            [self.form.name, "+".join(self.codecs), self.weight, self.grad, f"{self.block}", f"{self.rows}"]
        )


def pairwise(factors: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Rows in which every two values of two factors stand together at least once: each row is begun by the pair that
    is missing longest and filled greedily."""
    names = list(factors)
    missing = dict.fromkeys((a, x, b, y) for a, b in combinations(names, 2) for x, y in product(factors[a], factors[b]))
    rows = []
    while missing:
        a, x, b, y = next(iter(missing))
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                row[name] = max(
                    factors[name], key=lambda v, n=name: sum(p in missing for p in _pairs({**row, n: v}, names))
                )
        for pair in _pairs(row, names):
            missing.pop(pair, None)
        rows.append(row)
    return rows


def _pairs(row: Mapping[str, Any], names: Sequence[str]) -> list[tuple[Any, ...]]:
    return [(a, row[a], b, row[b]) for a, b in combinations(names, 2) if a in row and b in row]


@cache
def covering() -> tuple[Case, ...]:
    """The set, in a fixed order."""
    factors = {"rule": [*RULES], "codec": CODECS, "weight": WEIGHT_FORMATS, "grad": build.NUMBERS}
    rows = pairwise({**factors, "block": [256, 128, 32, 2048], "rows": [1, 8]})
    turns = dict.fromkeys(RULES, 0)
    out = []
    for row in rows:
        kept = [form for form in forms(row["rule"]) if form.states]
        form = kept[turns[row["rule"]] % len(kept)]
        out.append(_case(form, row, turns[row["rule"]]))
        turns[row["rule"]] += 1
    left = [form for stem in RULES for form in forms(stem) if form not in {case.form for case in out}]
    return (*out, *(_case(form, rows[-1 - k % len(rows)], k) for k, form in enumerate(left)))


def _case(form: Form, row: Mapping[str, Any], turn: int) -> Case:
    at = CODECS.index(row["codec"])
    codecs = tuple(CODECS[(at + j * (1 + turn)) % len(CODECS)] for j in range(len(form.states)))
    return Case(form, codecs, row["weight"], row["grad"], row["block"], row["rows"])
