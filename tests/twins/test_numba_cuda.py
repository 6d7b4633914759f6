"""The Numba-CUDA twin computes the oracle's bits on a GPU: the cases of the simulator, and larger ones."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the Numba-CUDA twin needs numba-cuda")

from tests.twins.combinations import EACH
from tests.twins.common import Case

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

LARGE = [
    (Case("adamw", ("dynamic8", "dynamic8"), block=256), (70_001,)),
    (Case("adamw", ("q4", "compand8"), "bf16_rem16", block=(256, 128)), (33, 300)),
    (Case("lion", ("fp8",), "bf16_sr", "float16"), (129, 257)),
]


@pytest.fixture(autouse=True)
def numpy_as_numba_cuda_knows_it(monkeypatch):
    """Numba-CUDA names `row_stack` while it is imported; NumPy 2.5 has it no more."""
    if not hasattr(np, "row_stack"):
        monkeypatch.setattr(np, "row_stack", np.vstack, raising=False)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_every_rule_codec_and_format_equals_the_oracle_bit_for_bit(case):
    from tests.twins import simulate

    for special in (False, True):
        simulate.checked(case, (5, 300), special)


def test_odd_blocks_and_large_tensors_equal_the_oracle_bit_for_bit():
    from tests.twins import simulate

    for case, shape in simulate.MORE + LARGE:
        for special in (False, True):
            simulate.checked(case, shape, special)
