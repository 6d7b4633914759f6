"""What LLVM makes of the host's loops: words of sixteen bits are widened and rounded eight at a time under AVX2."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections import Counter

import pytest

COMPILE = r"""
import numpy as np
from refopt_cuda.kernels import arguments, step_host
from refopt_cuda.rules import row

step_host.cached = lambda kernel, name: kernel  # what comes from disk has no listing
hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "wd": 0.1, "maximize": False, "gscale": 1.0}
p, g, m, v = (np.zeros(512, t) for t in (np.uint16, np.uint16, np.float32, np.float32))
states = [{"codes": m}, {"codes": v}]
step_host.step("adamw", ("f32", "f32"), p, g, states, (512,), 256, row("adamw", 1, hyper))
of = arguments.combination("adamw", ("f32", "f32"), p.dtype, g.dtype, None)
print(*step_host._plan(of).serial.inspect_asm().values())
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
def test_bfloat16_is_vectorised_without_avx512() -> None:
    """For a processor of 2013: widening, rounding, packing, and the rule itself in registers of 256 bits."""
    env = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx,+avx2"}
    run = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=True)
    ops = Counter(re.findall(r"^\s+(v\w+)\s+.*%(ymm|zmm)", run.stdout, re.M))
    assert not [op for op, width in ops if width == "zmm"], "the listing is of another processor"
    widened, rounded = ops["vpmovzxwd", "ymm"] + ops["vpslld", "ymm"], ops["vpaddd", "ymm"] + ops["vpsrld", "ymm"]
    assert widened >= 4 and rounded >= 2 and ops["vdivps", "ymm"] and ops["vsqrtps", "ymm"], ops
    assert re.search(r"vpack[us]+dw", run.stdout), "words are packed one by one"
