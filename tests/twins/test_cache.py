"""Host kernels are compiled once: the next process finds them on disk, unless a scalar form has changed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba")

ROOT = Path(__file__).parents[2]
SCRIPT = """
import numpy as np
from refopt_cuda.kernels import arguments, host_cache, step_host
from refopt_cuda.rules import RULES
if {edited}:
    host_cache._sources = lambda: "another scalar form"
p, g = np.ones(8, np.float32), np.ones(8, np.float32)
codecs, states = {{"sgd": ((), []), "lion": (("f32",), [{{"codes": np.zeros(8, np.float32)}}])}}[{rule!r}]
step_host.step({rule!r}, codecs, p, g, states, (8,), 256, RULES[{rule!r}].scalars(1, lr=0.5))
plan = step_host._plan(arguments.combination({rule!r}, codecs, p.dtype, g.dtype))
print(*p[:1], sum(plan.serial.stats.cache_hits.values()), sum(plan.serial.stats.cache_misses.values()))
"""


def run(folder: Path, rule: str = "sgd", edited: bool = False) -> str:
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT.format(rule=rule, edited=edited)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_the_second_process_finds_the_kernel_on_disk(tmp_path):
    assert run(tmp_path) == "0.5 0 1"
    assert run(tmp_path) == "0.5 1 0"
    assert run(tmp_path, rule="lion") == "0.5 0 1", "another rule must not be served the first one's kernel"
    assert run(tmp_path, edited=True) == "0.5 0 1", "a changed source must not be served the old kernel"


def test_two_signatures_never_share_a_file(tmp_path, monkeypatch):
    """Numba would number them in one index, and of two processes that do so at once one would overwrite the other's."""
    import numba
    from numba.core import config

    from refopt_cuda.kernels.host_cache import cached

    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    kernel = cached(numba.njit(lambda x: x + x), "doubled")
    assert (kernel(2), kernel(1.5)) == (4, 3.0)
    written = sorted(f.name.partition("doubled.")[2] for f in tmp_path.rglob("*.nb?"))
    keys = {name.split(".")[0] for name in written}
    assert len(keys) == 2 and len(written) == 4, written
    assert all(name.endswith((".nbi", ".1.nbc")) for name in written)


def test_two_processes_number_their_functions_apart():
    """With equal numbers, a kernel from disk lent its scalar forms to kernels compiled beside it: wrong codes in two of
    eight runs of six combinations that shared a cache."""
    script = "from refopt_cuda.kernels import step_host; from numba.core.bytecode import FunctionIdentity as f"
    script += "; print(next(f._unique_ids))"
    command = [sys.executable, "-c", script]
    numbers = [int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout) for _ in range(2)]
    assert abs(numbers[0] - numbers[1]) > 2**30
