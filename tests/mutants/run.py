"""Run one law against one package: over every case that it is parametrized with, until one fails."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.mutants.load import Mutant, copied, package

QUICK = settings(
    database=None,
    derandomize=True,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def find(law: str) -> Callable[..., None]:
    module, name = law.split(":")
    return getattr(importlib.import_module(f"tests.{module}"), name)


def shortened(law: Callable[..., None], examples: int) -> Callable[..., None]:
    """A law over drawn inputs with few of them, always the same, and no search for the smallest failure."""
    if not hasattr(law, "hypothesis"):
        return law
    return settings(QUICK, max_examples=examples)(given(**law.hypothesis._given_kwargs)(law.hypothesis.inner_test))


def values(row: Any, width: int) -> tuple[Any, ...]:
    """One row of a parametrization: a pytest.param, a tuple for several names, or a value for one."""
    if hasattr(row, "marks"):
        return row.values
    return tuple(row) if width > 1 else (row,)


def cases(law: Callable[..., None]) -> Iterator[dict[str, Any]]:
    """The keyword arguments of every parametrized call."""
    axes = []
    for mark in getattr(law, "pytestmark", []):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        axes.append([dict(zip(names, values(row, len(names)), strict=True)) for row in mark.args[1]])
    for choice in itertools.product(*axes):
        yield {name: value for part in choice for name, value in part.items()}


def broken(law: str, ref: ModuleType, examples: int = 25) -> BaseException | None:
    """What `law` says against `ref`, None if it holds."""
    test = find(law)
    quick = shortened(test, examples)
    for case in cases(test):
        try:
            quick(ref=ref, **case)
        except (NameError, SyntaxError, ImportError):
            raise  # the mutant cannot run at all: a mistake in its patch
        except (Exception, pytest.fail.Exception) as error:
            return error
    return None


def killed(mutant: Mutant, home: Path) -> bool:
    """Whether the law that a mutant names breaks on it."""
    with package(copied(home / "mutant", mutant)) as ref:
        return broken(mutant.law, ref) is not None
