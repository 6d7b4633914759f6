"""The Numba-CUDA twin computes the oracle's bits in the CUDA simulator, which needs a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")
pytest.importorskip("numba_cuda", reason="the Numba-CUDA twin needs numba-cuda")

from tests.twins.combinations import EACH

ROOT = Path(__file__).parents[2]


def test_simulated_kernels_equal_the_oracle_bit_for_bit():
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.twins.simulate"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("equal:") == len(EACH) + 3
