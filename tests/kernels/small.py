"""A small run of every way through the kernels, to be watched by compute-sanitizer:

    compute-sanitizer --tool memcheck python -m tests.kernels.small

Whole tiles and rows' ends, ragged rows, blocks within a tile and of several, one element at a time, codes of 4 bits,
scales of 16, weights with a rest and random bits, quantize and dequantize; through the optimizers counts that the
device keeps, clipping, rules of two and three passes, Muon, pages, and a 4-bit layer. Prints one line a case; a wrong
bit is an error.

initcheck does not see what a library's products store. New memory of the rules that have such products is filled with
NaN, so that what they leave unwritten, and the rule reads, is a wrong bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

import refopt_cuda as rc
from refopt import codecs
from tests.kernels.gpu_step import Pair

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "wd": 0.1}
SHAPES = [(3, 2048), (5, 264), (4, 1000), (9, 1000), (6, 96), (64, 16), (33, 255), (2500,), (7,), ()]
CASES: list[tuple[tuple[str, str], str, str, int | tuple[int, int]]] = [
    (("dynamic8", "dynamic8"), "bfloat16", "bfloat16", 256),
    (("dynamic8", "int8_linear"), "float32", "float16", 2048),
    (("q4", "q4"), "bf16_rem16", "bfloat16", 128),
    (("fp8", "compand8"), "bf16_sr", "float32", 32),
    (("dynamic8", "int8_linear"), "bfloat16", "bfloat16", (256, 32)),
    (("compand8.bf16", "fp8.e5m2"), "bf16_kahan", "bfloat16", (2048, 64)),
    (("f32", "bf16"), "bf16_ecc.8", "float32", 256),
    (("dynamic8", "q4"), "float16", "float16", 100),
]
MATRICES = [(48, 264), (16, 1000), (33, 64), (2500,), (7,), ()]
OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW8bit", {"capturable": True, "min_8bit_size": 0}),
    ("AdamW8bit", {"max_grad_norm": 0.5, "min_8bit_size": 0}),
    ("Lion", {"capturable": True, "max_grad_norm": 0.5}),
    ("PagedAdamW8bit", {"min_8bit_size": 0}),
    *((name, {}) for name in ("LAMB", "LAMB8bit", "LARS", "CAME", "AdamMini", "SM3")),
    ("Adafactor", {"relative_step": False}),
    *((name, {}) for name in ("Muon", "GaLoreAdamW", "APOLLOAdamW")),
]
INEXACT = ("Muon", "GaLoreAdamW", "APOLLOAdamW")
"""Rules whose matrix products are a library's."""


def main() -> None:
    rng = np.random.default_rng(0)
    for states, weight, grad, block in CASES:
        pair = Pair("adamw", states, weight, grad, HYPER, block)
        pair.start([np.asarray(rng.standard_normal(s), np.float32) for s in SHAPES])
        for shift in (0, 4):
            pair.step([np.asarray(rng.standard_normal(s), np.float32) for s in SHAPES], shift)
        print(f"adamw {'+'.join(states)} {weight} {grad} {block}: equal", flush=True)
    quantized(rng)
    for name, words in OPTIMIZERS:
        with poisoned() if name in INEXACT else nullcontext():
            optimizer(name, words)
    linear()


@contextmanager
def poisoned() -> Iterator[None]:
    """All memory that torch makes without values is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert bool(torch.empty(5, device="cuda").isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def optimizer(name: str, words: dict[str, Any]) -> None:
    """Three steps on the device and on the host: the same bits where the rule promises them."""
    torch.manual_seed(0)
    start = [torch.randn(s) for s in MATRICES if len(s) == 2 or name not in ("Muon", "AdamMini")]
    sides = {device: [torch.nn.Parameter(x.to(device)) for x in start] for device in ("cuda", "cpu")}
    beside = {k: v for k, v in words.items() if k not in ("capturable", "place", "page_bytes")}
    opts = {"cuda": getattr(rc.optim, name)(sides["cuda"], lr=0.01, **words)}
    opts["cpu"] = getattr(rc.optim, name)(sides["cpu"], lr=0.01, **beside)
    for _ in range(3):
        for p, q in zip(*sides.values(), strict=True):
            q.grad = torch.randn(q.shape)
            p.grad = q.grad.to("cuda")
        for opt in opts.values():
            opt.step()
    apart = [float((p.cpu() - q).abs().max()) for p, q in zip(*sides.values(), strict=True)]
    if not all(x <= (1e-4 if name in INEXACT else 0.0) for x in apart):
        raise AssertionError(f"{name} {words}: the device and the host are {apart} apart")
    print(f"{name} {words}: {'close' if name in INEXACT else 'equal'}", flush=True)


def linear() -> None:
    """A 4-bit layer forward and back."""
    for bias in (True, False):
        layer = rc.nn.Linear4bit.of(torch.nn.Linear(264, 96, bias=bias), device="cuda")
        x = torch.randn(5, 264, device="cuda", requires_grad=True)
        layer(x).square().sum().backward()
        assert x.grad is not None and bool(x.grad.isfinite().all())
    print("Linear4bit: finite", flush=True)


def quantized(rng: np.random.Generator) -> None:
    import cupy

    for name in ("dynamic8", "nf4", "double", "compand8"):
        for shape in SHAPES[:7]:
            x = np.asarray(rng.standard_normal(shape), np.float32)
            back = rc.dequantize(rc.quantize(cupy.asarray(x), name)).get()
            assert (back == codecs.CODECS[name].encode(x).decode()).all(), f"{name} {shape}"
        print(f"quantize and dequantize {name}: equal", flush=True)


if __name__ == "__main__":
    main()
