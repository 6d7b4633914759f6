"""What Numba-CUDA makes of the twins, read from PTX that needs no driver: no contraction, nothing in float64."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the Numba-CUDA twin needs numba-cuda")
from numba import cuda

if not hasattr(cuda, "compile_ptx"):
    pytest.skip("the CUDA simulator makes no PTX", allow_module_level=True)

from refopt_cuda.kernels import arguments, arith, step_numba
from tests.twins.combinations import EACH


@pytest.fixture(autouse=True)
def a_device_in_name_only(monkeypatch):
    """Numba-CUDA asks the current device for its compute capability before it compiles an inner function."""
    from numba.cuda import dispatcher

    monkeypatch.setattr(dispatcher, "get_current_device", lambda: SimpleNamespace(compute_capability=(9, 0)))


def ptx_of(function, signature) -> str:
    try:
        return cuda.compile_ptx(function, signature, cc=(9, 0))[0]
    except (FileNotFoundError, OSError, RuntimeError) as error:
        pytest.skip(f"no NVVM to compile PTX with: {error}")


@pytest.mark.parametrize("case", EACH, ids=str)
def test_ptx_has_no_contraction_and_no_float64(case):
    of = combination(case)
    blocks = (case.block,) * len(of.codecs)
    ptx = ptx_of(step_numba.body(of, blocks, case.block, arith.cuda()), step_numba.signature(of))
    assert "fma.rn" not in ptx
    assert ".f64" not in ptx
    assert not re.search(r"(div|rcp|sqrt)\.(approx|full)", ptx)
    assert len(re.findall(r"mul\.rn\.f32", ptx)) >= 2, "the rule itself must be in there"


def combination(case):
    """The forms of a case's kernel."""
    dtypes = (np.dtype("uint16" if number == "bfloat16" else number) for number in (case.visible, case.grad))
    weight = case.weight if case.weight != case.visible else None
    return arguments.combination(case.form, case.codecs, *dtypes, weight)


def test_plain_operators_would_be_contracted():
    """The reason for `arith.cuda`, and proof that the test above can fail."""
    from numba import types

    def kernel(x):
        x[0] = x[0] * x[1] + x[2]

    assert "fma.rn" in ptx_of(kernel, (types.Array(types.float32, 1, "C"),))
