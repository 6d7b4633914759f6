"""The rules as scalar forms: one element in, one element out, over an arithmetic that the back end supplies.

A rule module holds `SCALARS` (names of the float32 row a step reads, in order), `STATES` (name and "never negative" of
each state, in order), `scalars(t, **hyper)` and `make(o)`, which returns `step(p, g, x, s) -> (p, x)`.
"""

from __future__ import annotations

from types import ModuleType

from refopt_cuda.rules import adam, adamw, lion, sgd

__all__ = ["RULES"]

RULES: dict[str, ModuleType] = {"sgd": sgd, "adam": adam, "adamw": adamw, "lion": lion}
