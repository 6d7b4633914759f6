"""Every test that takes `device` runs on the CPU and, marked `gpu`, on a CUDA device."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""A disk that waits for nothing."""


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where the parameters of a test lie."""
    return str(request.param)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that does not exist yet."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as parent:
        yield Path(parent) / "states"
