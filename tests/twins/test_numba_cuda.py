"""The Numba-CUDA twin computes the oracle's bits on a GPU: the cases of the simulator, and larger ones."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the Numba-CUDA twin needs numba-cuda")

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

LARGE = [
    ("adamw", ("dynamic8", "dynamic8"), (70_001,), 256),
    ("adamw", ("f32", "dynamic8"), (33, 300), 256),
    ("lion", ("dynamic8",), (129, 257), 64),
]


def test_the_readable_kernel_equals_the_oracle_bit_for_bit(monkeypatch):
    if not hasattr(np, "row_stack"):  # Numba-CUDA names it while it is imported; NumPy 2.5 has it no more
        monkeypatch.setattr(np, "row_stack", np.vstack, raising=False)
    from tests.twins import simulate

    for case in simulate.CASES + LARGE:
        for special in (False, True):
            simulate.check(*case, special)
