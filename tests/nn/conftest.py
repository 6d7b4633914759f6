"""Every test that takes `device` runs on the CPU and, marked `gpu`, on a CUDA device."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the parameters of a test lie."""
    return str(request.param)
