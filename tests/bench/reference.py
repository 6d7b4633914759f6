"""Seconds that the reference takes for one step of ten million elements, by rule and by codec.

python -m tests.bench.reference [--commit HASH]
"""

from __future__ import annotations

import platform
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

from refopt import Optimizer, codecs, rules
from tests.bench.record import Recorder, arguments, software

SHAPE = (2500, 4000)


def subjects() -> Iterator[tuple[str, Optimizer]]:
    """Every rule that is exact (T0 and T1), uncoded; AdamW with every codec, of its states or of its weights."""
    for stem, rule in rules.RULES.items():
        if rule.tier != "T2":
            yield stem, Optimizer(stem, **({"momentum": 0.9} if stem == "sgd" else {}))
    for stem, codec in codecs.CODECS.items():
        if stem != "f32":
            yield f"adamw {stem}", Optimizer("adamw", {"p": codec} if codec.weights else codec)


def seconds(opt: Optimizer, p: Any, g: Any, times: int = 3) -> float:
    """The fastest of a few steps; the first compiles where Numba is."""
    state, taken = opt.init(p), []
    for _ in range(times):
        start = time.perf_counter()
        _, state = opt.step(p, g, state)
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    device = f"CPU {platform.machine()}, 1 thread"
    rec = Recorder("reference", device, software("numpy", "numba"), args.commit, args.out)
    rng = np.random.default_rng(0)
    p, g = rng.standard_normal((2, *SHAPE)).astype(np.float32)
    warnings.simplefilter("ignore")
    for name, opt in subjects():
        if args.only and name not in args.only:
            continue
        rec.add("flat10m", name, "s", seconds(opt, p, g, 1 if args.quick else 3), "s")
    if not args.dry:
        rec.save()


if __name__ == "__main__":
    main()
