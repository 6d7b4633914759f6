"""The last exercise of the course: it cannot be passed unsolved, its answer passes, and slips are named."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from refopt import conform

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "exercise"


@pytest.fixture
def exercise(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a module of the exercise anew, as one who stands in its folder does."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in ("frame", "my_rule", "solution"):
        sys.modules.pop(name, None)


def ids(report: conform.Report) -> set[str]:
    return {finding.id for finding in report.findings if finding.status == "fail"}


def test_what_is_to_be_filled_in_says_so(exercise: Any) -> None:
    report = conform.run(exercise("my_rule").target, "ademamix")
    assert not any(finding.status == "pass" for finding in report.findings)
    assert "encode: the largest magnitude of each block" in report.text()


def test_the_answer_passes_every_level_that_can_be_asked(exercise: Any) -> None:
    report = conform.run(exercise("solution").target, "ademamix")
    assert report.ok, report.text()
    passed = {finding.level for finding in report.findings if finding.status == "pass"}
    assert passed == {"L0", "L1", "L3", "L5", "L6", "L7"}


def test_the_answer_fits_the_gaps_of_the_exercise(exercise: Any) -> None:
    mine, answer = exercise("my_rule"), exercise("solution")
    for name in ("encode", "decode", "init", "update"):
        assert inspect.signature(getattr(mine, name)) == inspect.signature(getattr(answer, name))


def slips(answer: ModuleType) -> dict[str, tuple[str, Any]]:
    """{what is expected: (the function that is replaced, what replaces it)}"""
    right, update = answer.encode, answer.update

    def scale_of_the_tensor(x: np.ndarray, signed: bool) -> Any:
        codes, scales = right(x, signed)
        return codes, np.full_like(scales, scales.max(initial=0))

    def in_place(p: np.ndarray, g: np.ndarray, state: Any, **hyper: Any) -> Any:
        new, state = update(p, g, state, **hyper)
        p[...] = new
        return p, state

    def toward_zero(x: np.ndarray, signed: bool) -> Any:
        codes, scales = right(x, signed)
        back = answer.decode(codes, scales, signed, x.shape).ravel()
        return (codes - np.sign(back) * (np.abs(back) > np.abs(x.ravel()))).astype(np.uint8), scales

    return {
        "scale-differs": ("encode", scale_of_the_tensor),
        "input-changed": ("update", in_place),
        "codes-truncated": ("encode", toward_zero),
    }


@pytest.mark.parametrize("expected", ["scale-differs", "input-changed", "codes-truncated"])
def test_a_slip_in_the_answer_is_named(exercise: Any, monkeypatch: pytest.MonkeyPatch, expected: str) -> None:
    answer = exercise("solution")
    name, wrong = slips(answer)[expected]
    if name == "update":
        wrong.__signature__ = inspect.signature(answer.update)
    monkeypatch.setattr(answer, name, wrong)
    frame = exercise("frame")
    target = frame.EightBit(answer.init, answer.update, "a slip")
    found = ids(conform.run(target, "ademamix", only=["L0", "L1", "L3"]))
    assert expected in found, found
