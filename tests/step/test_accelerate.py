"""Compiled loops give NumPy's bits, and are not compiled where they are not wanted."""

from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refopt import Optimizer, accelerate, reduce
from refopt.codecs.dynamic8 import midpoints
from tests.bits import same_bits, same_state
from tests.strategies import arrays, f32

pytest.importorskip("numba", reason="the compiled loops need numba: pip install 'refopt[numba]'")


def loops(ref: ModuleType) -> Any:
    """The compiled loops of the subject."""
    return importlib.import_module(f"{ref.__name__}.accelerate")._loops()


@given(y=arrays([(1,), (129,), (3, 40)]), signed=st.booleans(), planted=st.booleans())
def test_the_search_finds_what_numpy_finds(ref: ModuleType, y: Any, signed: bool, planted: bool) -> None:
    points, count = midpoints(signed), loops(ref)["count"]
    if planted:
        y = np.concatenate(
            [y.reshape(-1), points, np.nextafter(points, f32(9)), f32([0, -0.0, np.nan, np.inf, -np.inf])]
        )
    want = np.searchsorted(points, y, side="left")
    same_bits(count(points, y.reshape(-1)).reshape(y.shape), want, "count")


@given(x=arrays([(1, 1), (3, 40), (2, 257), (5, 1000), (0, 4), (3, 0)]), double=st.booleans())
def test_lanes_add_in_the_same_order(ref: ModuleType, x: Any, double: bool) -> None:
    x = x.astype(np.float64) if double else x
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accelerate, "LEAST", 1 << 60)
        same_bits(loops(ref)["lanes"](x, 256), accelerate.lanes(x, 256), "lanes")


def test_either_way_a_whole_step_has_the_same_bits(monkeypatch: Any) -> None:
    rng = np.random.default_rng(5)
    p, g = rng.standard_normal((2, 70, 300)).astype(f32)
    found = []
    for least in (0, 1 << 60):
        monkeypatch.setattr(accelerate, "LEAST", least)
        both = [Optimizer(rule, codec) for rule, codec in (("adamw", "dynamic8"), ("adafactor", None), ("adamw", "q4"))]
        found.append([opt.step(p, g, opt.init(p)) for opt in both] + [(f32(reduce.total(p)), [{}])])
    for (p1, s1), (p2, s2) in zip(*found, strict=True):
        same_bits(p1, p2, "p")
        same_state(s1[0], s2[0])


def test_an_environment_variable_turns_it_off(monkeypatch: Any) -> None:
    monkeypatch.setenv("REFOPT_NUMBA", "0")
    assert not accelerate.wanted(1 << 40)
    monkeypatch.setenv("REFOPT_NUMBA", "1")
    assert accelerate.wanted(1 << 40) and not accelerate.wanted(accelerate.LEAST - 1)


def test_small_steps_import_no_numba() -> None:
    code = "import sys, numpy as np, refopt; o = refopt.Optimizer('adamw', 'dynamic8'); p = np.ones(9, np.float32)"
    code += "; o.step(p, p, o.init(p)); sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
