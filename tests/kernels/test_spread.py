"""Tiles of a tensor among the threads of a CPU: each is stepped once, whoever takes it."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from refopt_cuda.kernels.arith import OUTER
from refopt_cuda.kernels.host_tiles import spread


@pytest.fixture(scope="module")
def parallel() -> Any:
    @numba.njit(**OUTER)
    def serial(p, rest, g, codes, scales, s, blocks, row, tile, key, lo, hi):
        for k in range(lo, hi):
            p[k] += 1
            for _ in range(rest[k]):  # some take long
                s[k] = s[k] * 0.5 + 1.0

    return spread(serial)


@pytest.mark.parametrize("threads", [1, 2, 3, 16])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 63, 64, 65, 1000, 10_007])
def test_every_tile_is_stepped_once(parallel: Any, count: int, threads: int) -> None:
    for slow in (count // 3, -1):
        seen, pause = np.zeros(count + 64, np.int64), np.zeros(count + 64, np.int64)
        pause[slow:count] = 200 if slow >= 0 else 0
        parallel(seen, pause, 0, 0, 0, np.zeros(count + 64), 0, 0, 0, 0, count, threads)
        assert (seen[:count] == 1).all() and not seen[count:].any()
