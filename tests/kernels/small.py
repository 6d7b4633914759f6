"""A small run of every way through the kernels, to be watched by compute-sanitizer:

    compute-sanitizer --tool memcheck python -m tests.kernels.small

Whole tiles and rows' ends, blocks within a tile and of several, one element at a time, codes of 4 bits, scales of 16,
weights with a rest and random bits, quantize and dequantize. Prints one line a case; a wrong bit is an error.
"""

from __future__ import annotations

import numpy as np

import refopt_cuda as rc
from refopt import codecs
from tests.kernels.gpu_step import Pair

HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.99, "wd": 0.1}
SHAPES = [(3, 2048), (5, 264), (4, 1000), (6, 96), (64, 16), (33, 255), (2500,), (7,), ()]
CASES: list[tuple[tuple[str, str], str, str, int | tuple[int, int]]] = [
    (("dynamic8", "dynamic8"), "bfloat16", "bfloat16", 256),
    (("dynamic8", "int8_linear"), "float32", "float16", 2048),
    (("q4", "q4"), "bf16_rem16", "bfloat16", 128),
    (("fp8", "compand8"), "bf16_sr", "float32", 32),
    (("compand8.bf16", "fp8.e5m2"), "bf16_kahan", "bfloat16", (2048, 64)),
    (("f32", "bf16"), "bf16_ecc.8", "float32", 256),
    (("dynamic8", "q4"), "float16", "float16", 100),
]


def main() -> None:
    rng = np.random.default_rng(0)
    for states, weight, grad, block in CASES:
        pair = Pair("adamw", states, weight, grad, HYPER, block)
        pair.start([np.asarray(rng.standard_normal(s), np.float32) for s in SHAPES])
        for shift in (0, 4):
            pair.step([np.asarray(rng.standard_normal(s), np.float32) for s in SHAPES], shift)
        print(f"adamw {'+'.join(states)} {weight} {grad} {block}: equal", flush=True)
    quantized(rng)


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
