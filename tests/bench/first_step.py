"""One line of JSON: seconds of the first step of a subject on Llama-3.2-1B's tensors in this process.

torch.optim.SGD steps one weight before, and its seconds stand beside: with the first step of any optimizer torch
imports its compiler, which takes seconds where bytecode is not kept.

python -m tests.bench.first_step SUBJECT [DEVICE [SMALLER]]
"""

from __future__ import annotations

import contextlib
import json
import sys
import time

import torch

from tests.bench import clocks, models
from tests.bench.subjects import named


def main(name: str, device: str = "cuda", smaller: str = "1") -> None:
    start = time.perf_counter()
    with contextlib.suppress(ImportError):
        import cupy  # noqa: F401
    cupy_seconds = time.perf_counter() - start
    torch_seconds = torchs_own(device)
    (subject,) = named(name)
    params = models.parameters(models.llama1b().smaller(int(smaller)), device)
    clocks.synchronize(device)
    start = time.perf_counter()
    subject.make(params).step()
    clocks.synchronize(device)
    print(json.dumps({"seconds": time.perf_counter() - start, "cupy": cupy_seconds, "torch": torch_seconds}))


def torchs_own(device: str) -> float:
    """Seconds of the first step of an optimizer of torch."""
    p = torch.nn.Parameter(torch.ones(1, device=device))
    p.grad = torch.ones_like(p)
    clocks.synchronize(device)
    start = time.perf_counter()
    torch.optim.SGD([p]).step()
    clocks.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
