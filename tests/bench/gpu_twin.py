"""What readability costs: the Numba-CUDA twin of 8-bit and of float32 AdamW, its launch alone, on arrays on the device.

    python -m tests.bench.gpu_twin [--only AdamW8bit] [--commit HASH]

`step_numba.step`, which is given NumPy arrays, copies them to the device and back besides; that is not counted here.
With NUMBA_ENABLE_CUDASIM=1 and --elements 512 --dry it runs where there is no GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

if not hasattr(np, "row_stack"):  # Numba-CUDA names it while it is imported; NumPy 2.5 has it no more
    np.row_stack = np.vstack  # type: ignore[attr-defined]

from numba import cuda

from refopt_cuda.kernels import arguments, step_numba
from refopt_cuda.rules import row
from tests.bench import moved
from tests.bench.models import count
from tests.bench.record import Recorder, software
from tests.bench.record import arguments as options

HYPER = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "wd": 0.01}
SUBJECTS = {"AdamW8bit": "dynamic8", "AdamW": "f32"}
BF16 = np.dtype(np.uint16)


def prepared(codec: str, n: int) -> tuple[Callable[[], None], int]:
    """One launch over n bfloat16 weights, and the bytes that it must move."""
    of = arguments.combination("adamw", (codec, codec), BF16, BF16)
    cut = arguments.cut(of.codecs, (n,), 256)
    rng = np.random.default_rng(0)
    p, g = ((rng.standard_normal(n).astype(np.float32) * s).view(np.uint32) >> 16 for s in (1.0, 1e-3))
    states = [_zero(codec, n, signed) for signed in (True, False)]
    host = arguments.arrays(of, cut, p.astype(BF16), g.astype(BF16), states, None)
    scalars = tuple(arguments.row(of, row("adamw", 1, HYPER)))
    device, codes, scales = map(_on_device, ((host.p, host.rest, host.g), host.codes, host.scales))
    coded = any(form.scaled for form in of.codecs)
    largest = cut.largest if coded else step_numba.UNCODED
    run, grid = step_numba.kernel(of, cut.blocks, largest), cut.size // cut.row * -(-cut.row // largest)
    key = arguments.key(of, None)

    def launch() -> None:
        run[grid, step_numba.THREADS](*device, codes, scales, scalars, np.int64(cut.row), key)

    kept = sum(a.nbytes for state in states for a in state.values())
    return launch, moved.must_move("element", 2 * n, 2 * n, kept)


def _on_device(arrays: Sequence[np.ndarray]) -> tuple[Any, ...]:
    return tuple(cuda.to_device(a if a.size else np.zeros(1, a.dtype)) for a in arrays)


def _zero(codec: str, n: int, signed: bool) -> dict[str, np.ndarray]:
    if codec == "f32":
        return {"codes": np.zeros(n, np.float32)}
    return {"codes": np.full(n, 127 if signed else 0, np.uint8), "scales": np.zeros(-(-n // 256), np.float32)}


def median_ms(launch: Callable[[], None], times: int) -> float:
    """Of a launch, waited for; the first three, of which one compiles, are not counted."""
    taken = []
    for _ in range(times + 3):
        cuda.synchronize()
        start = time.perf_counter()
        launch()
        cuda.synchronize()
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.median(taken[3:])


def copy_bandwidth(n: int) -> float:
    """Bytes read plus written in a second by a copy on the device of as many float64."""
    a, b = cuda.to_device(np.zeros(n)), cuda.device_array(n, np.float64)
    return 2 * 8 * n / (median_ms(lambda: b.copy_to_device(a), 20) * 1e-3)


def main(argv: Sequence[str] | None = None) -> Recorder:
    parser = options(__doc__ or "")
    parser.add_argument("--elements", type=int, default=2**26)
    args = parser.parse_args(argv)
    device = "simulator" if step_numba.simulated() else cuda.get_current_device().name
    name = device.decode() if isinstance(device, bytes) else device
    rec = Recorder("gpu_twin", name, software("numba", "numba-cuda", "numpy"), args.commit, args.out)
    if not args.dry:
        rec.check()
    copy = copy_bandwidth(args.elements)
    for subject, codec in SUBJECTS.items():
        if args.only and subject not in args.only:
            continue
        try:
            launch, bytes_ = prepared(codec, args.elements)
            ms = median_ms(launch, 5 if args.quick else 20)
        except Exception as error:
            print(f"{subject} FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        work = f"flat{count(args.elements)}"
        rec.add(work, f"Numba-CUDA twin {subject}", "ms", ms, "ms")
        reached = bytes_ / (ms * 1e-3)
        rec.add(work, f"Numba-CUDA twin {subject}", "of_copy", reached / 1e9, "GB/s", "device copy", reached / copy)
    if not args.dry:
        rec.save()
    return rec


if __name__ == "__main__":
    main()
