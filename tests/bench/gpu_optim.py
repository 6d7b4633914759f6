"""One step of every optimizer on one GPU, through its public class, against the device's own copy and the peers.

    python -m tests.bench.gpu_optim [--commit HASH] [--only NAME,...] [--work llama1b,lora7b] [--peers --dead --sizes]

of_copy = bytes that a step must move / time / copy bandwidth, all in this process. A subject that fails prints its
error, and the rest goes on.
"""

from __future__ import annotations

import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from refopt_cuda import optim
from tests.bench.gpu_step import copy_bandwidth, median_ms
from tests.bench.models import WORK, Shape, parameters, regrade, size
from tests.bench.record import Recorder, arguments, software

Make = Callable[[list[torch.nn.Parameter]], Any]
STATES = {"f32": 4.0, "8bit": 1 + 4 / 256, "Fp8": 1 + 4 / 256, "4bit": 0.5 + 4 / 128}
"""Bytes of one state of one parameter."""


def ours(name: str, **words: Any) -> Make:
    return lambda params: getattr(optim, name)(params, **words)


def adam_like(name: str, states: int, per: float, rest: float = 0.0, **words: Any) -> tuple[Make, float]:
    """A class, and the bytes a parameter that its step moves: p twice, g once, states and what is beside p twice."""
    return ours(name, **words), 6 + 2 * states * per + 2 * rest


SUBJECTS: dict[str, tuple[Make, float]] = {
    "AdamW": adam_like("AdamW", 2, 4.0),
    "AdamW8bit": adam_like("AdamW8bit", 2, STATES["8bit"]),
    "AdamW8bit+rem16": adam_like("AdamW8bit", 2, STATES["8bit"], 2.0, codecs={"p": "bf16_rem16"}),
    "AdamWFp8": adam_like("AdamWFp8", 2, STATES["Fp8"]),
    "AdamW4bit": adam_like("AdamW4bit", 2, STATES["4bit"]),
    "Lion8bit": adam_like("Lion8bit", 1, STATES["8bit"]),
    "SGD8bit": adam_like("SGD8bit", 1, STATES["8bit"], momentum=0.9),
    "AdEMAMix8bit": adam_like("AdEMAMix8bit", 3, STATES["8bit"]),
    # Passes: p and g read, g again for the size of the update, g and p for the update, p written.
    "Adafactor": (ours("Adafactor"), 2 + 2 + 2 + 2 + 2 + 2),
    # p, g, m for the first sums; g, m again for the residual; p, g, m again, p and m written.
    "CAME": (ours("CAME", lr=1e-4), (2 + 4) + (2 + 4) + (2 + 2 + 4) + (2 + 4)),
    # 10 read for the norms; 10 again, and p, m, v written.
    "LAMB": (ours("LAMB"), 12 + 12 + 10),
}


def peers() -> Iterable[tuple[str, Make, float]]:
    """What is installed of bitsandbytes, FlashOptim and optimi; torch's own."""
    yield "torch AdamW fused", lambda p: torch.optim.AdamW(p, fused=True), 6 + 8
    try:
        import bitsandbytes as bnb

        yield "bitsandbytes AdamW8bit", lambda p: bnb.optim.AdamW8bit(p), 6 + 4 * STATES["8bit"]
        yield "bitsandbytes AdamW32bit", lambda p: bnb.optim.AdamW32bit(p), 6 + 16
        yield "bitsandbytes Lion8bit", lambda p: bnb.optim.Lion8bit(p), 6 + 2 * STATES["8bit"]
    except ImportError as error:
        print(f"bitsandbytes: {error}")
    try:
        import flashoptim

        yield "FlashOptim AdamW", lambda p: flashoptim.FlashAdamW(p, lr=1e-3, master_weight_bits=None), 6 + 4 * 1.0625
    except ImportError as error:
        print(f"flashoptim: {error}")
    try:
        import optimi

        yield "optimi AdamW Kahan", lambda p: optimi.AdamW(p, lr=1e-3, triton=True), 6 + 12
    except ImportError as error:
        print(f"optimi: {error}")


def wall_ms(step: Callable[[], Any], before: Callable[[], Any], times: int) -> float:
    """Median of the time that the host spends in step(), with nothing waiting on the device before it."""
    taken = []
    for _ in range(times):
        before()
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e3 * statistics.median(taken)


def gpu_ms(step: Callable[[], Any], before: Callable[[], Any], times: int) -> float:
    """Median of CUDA-event times, with what `before` does outside of them."""
    pairs = []
    for _ in range(times):
        before()
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        step()
        events[1].record()
        pairs.append(events)
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in pairs)


def measure(rec: Recorder, work: str, name: str, make: Make, per: float, copy: float, times: int = 20) -> None:
    """Time, memory and fraction of copy of one subject on one workload."""
    shapes = WORK[work]
    params, n = parameters(shapes), size(shapes)
    fresh = (lambda: regrade(params)) if work == "lora7b" else (lambda: None)
    held = torch.cuda.memory_allocated()
    opt = make(params)
    for _ in range(3):
        fresh()
        opt.step()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    opt.step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - kept
    ms = gpu_ms(opt.step, fresh, times)
    rec.add(work, name, "ms", ms, "ms")
    rec.add(work, name, "wall_ms", wall_ms(opt.step, fresh, times), "ms")
    reached = per * n / (ms * 1e-3)
    rec.add(work, name, "of_copy", reached / 1e9, "GB/s", "device copy", reached / copy)
    rec.add(work, name, "state_bytes", (kept - held) / n, "B/param")
    rec.add(work, name, "extra_bytes", extra / n, "B/param")


def guarded(name: str, run: Callable[[], None]) -> None:
    """Run a subject; a failure is printed and leaves nothing on the device."""
    try:
        run()
    except Exception:
        print(f"{name}: failed\n{traceback.format_exc(limit=3)}", flush=True)
    gc.collect()
    torch.cuda.empty_cache()


def first_steps(rec: Recorder) -> None:
    """Seconds of the first step in a new process: with nothing compiled yet, and with what that compiled."""
    code = (
        "import time, torch, refopt_cuda.optim as o; from tests.bench.models import WORK, parameters\n"
        "p = parameters(WORK['llama1b'][:9]); opt = o.AdamW8bit(p); torch.cuda.synchronize(); t = time.perf_counter()\n"
        "opt.step(); torch.cuda.synchronize(); print(time.perf_counter() - t)"
    )
    with tempfile.TemporaryDirectory() as folder:
        for metric in ("first_step_cold", "first_step_warm"):
            env = {**os.environ, "CUPY_CACHE_DIR": folder}
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
            rec.add("llama1b", "AdamW8bit", metric, float(done.stdout), "s")


def dead(rec: Recorder, steps: int = 2000) -> None:
    """A fifth of the rows without a gradient for 2,000 steps: their states die away; time against the live tensor."""
    shape: Shape = (2**16, 2**12)
    for name, words in (("AdamW8bit", {}), ("AdamW", {}), ("AdamW8bit", {"betas": (0.9, 0.95)})):
        label = name + (" beta2=.95" if words else "")

        def run(name: str = name, words: dict[str, Any] = words, label: str = label) -> None:
            times = {}
            for state in ("dense", "dead"):
                params = parameters([shape])
                if state == "dead":
                    params[0].grad[: shape[0] // 5] = 0  # type: ignore[index]
                opt = getattr(optim, name)(params, **words)
                for _ in range(steps if state == "dead" else 100):
                    opt.step()
                times[state] = median_ms(opt.step)
                del opt, params
            rec.add("dead20", label, "ms", times["dead"], "ms", "dense", times["dense"] / times["dead"])

        guarded(label, run)


def sizes(rec: Recorder, copy: float) -> None:
    """Time against size, other formats, blocks and ragged rows."""
    ladder = [2**k for k in range(20, 33, 2)]
    cases: list[tuple[str, str, list[Shape], torch.dtype, dict[str, Any], float]] = []
    for n in ladder:
        work, small = f"flat{n >> 20}m", {"min_8bit_size": 0}
        cases.append((work, "AdamW8bit", [(n,)], torch.bfloat16, small, 6 + 4 * STATES["8bit"]))
        if n < 2**32:  # 4 GiB of weights, as many of gradients, and 32 of states leave no room on 80 GB
            cases.append((work, "AdamW", [(n,)], torch.bfloat16, {}, 22.0))
    for dtype in (torch.float32, torch.float16):
        word, width = str(dtype).removeprefix("torch."), 12 if dtype == torch.float32 else 6
        cases.append((f"flat268m-{word}", "AdamW8bit", [(2**28,)], dtype, {}, width + 4 * STATES["8bit"]))
        cases.append((f"flat268m-{word}", "AdamW", [(2**28,)], dtype, {}, width + 16))
    for block in (16, 32, 64, 128, 256, 512, 1024, 2048):
        per = 6 + 4 * (1 + 4 / block)
        cases.append((f"block{block}", "AdamW8bit", [(2**28,)], torch.bfloat16, {"block": block}, per))
    for row in (16, 96, 264, 1000):
        per = 6 + 4 * (1 + 4 * -(-row // 256) / row)
        cases.append((f"rows{row}", "AdamW8bit", [(2**27 // row, row)], torch.bfloat16, {}, per))
    for work, name, shapes, dtype, words, per in cases:
        guarded(f"{work} {name}", partial(plain, rec, work, name, shapes, dtype, words, per, copy))


def plain(
    rec: Recorder, work: str, name: str, shapes: list[Shape], dtype: torch.dtype, words: Any, per: float, copy: float
) -> None:
    """Time and fraction of copy of a class on these shapes."""
    params = parameters(shapes, dtype)
    opt = getattr(optim, name)(params, **words)
    ms = median_ms(opt.step)
    reached = per * size(shapes) / (ms * 1e-3)
    rec.add(work, name, "ms", ms, "ms")
    rec.add(work, name, "of_copy", reached / 1e9, "GB/s", "device copy", reached / copy)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--only", default="", help="subjects, separated by commas")
    parser.add_argument("--work", default="llama1b,lora7b", help="workloads")
    for option in ("peers", "dead", "sizes", "first"):
        parser.add_argument(f"--{option}", action="store_true")
    args = parser.parse_args()
    libraries = ("torch", "cupy-cuda13x", "numpy", "bitsandbytes", "flashoptim", "torch-optimi")
    rec = Recorder("gpu_optim", torch.cuda.get_device_name(), software(*libraries), args.commit, args.out)
    copy = copy_bandwidth()
    rec.add("flat1g", "device copy", "bandwidth", copy / 1e9, "GB/s")
    only = set(filter(None, args.only.split(",")))
    if args.first:
        guarded("first steps", lambda: first_steps(rec))
    for work in filter(None, args.work.split(",")):
        for name, (make, per) in SUBJECTS.items():
            if not only or name in only:
                guarded(name, lambda w=work, n=name, m=make, b=per: measure(rec, w, n, m, b, copy))  # type: ignore[misc]
        for name, make, per in peers() if args.peers else ():
            guarded(name, lambda w=work, n=name, m=make, b=per: measure(rec, w, n, m, b, copy, 10))  # type: ignore[misc]
    if args.dead:
        dead(rec)
    if args.sizes:
        sizes(rec, copy)
    if not args.dry:
        rec.save()


if __name__ == "__main__":
    main()
