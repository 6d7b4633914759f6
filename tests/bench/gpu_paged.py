"""States in host memory on one GPU: paged steps beside the link, bitsandbytes' paged steps, and what the device holds.

    python -m tests.bench.gpu_paged [--parts link,paged,whole,bitsandbytes,memory] [--quick] [--commit HASH]

link     bytes a second each way while pinned memory is copied both ways at once, in pages of the size that is used
ms       a step of many in a row, the last store waited for
of_link  (bytes of states / ms) / link: every state byte goes each way once
faster   bitsandbytes' ms / ours; its managed pages are sent to the host after every step, which is not timed
memory   bytes that the whole device has in use above an empty one / what `refopt.memory` says of p, g and the ring

With --device cpu --smaller 8 --dry the script can be tried without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from refopt import Optimizer, places
from refopt import memory as memory_of
from refopt_cuda import optim
from refopt_cuda.optim.decks import BUFFERS
from refopt_cuda.optim.paging import PAGE_BYTES
from refopt_cuda.places import lanes, slabs
from refopt_cuda.train.subjects import state_bytes
from tests.bench import clocks, models
from tests.bench.models import Work
from tests.bench.record import Limit, Recorder, arguments, names, software

PACKAGES = ("torch", "cupy-cuda13x", "numpy", "bitsandbytes")
SUBJECTS = ("PagedAdamW", "PagedAdamW8bit", "PagedAdamW4bit", "PagedLion8bit")
WHOLE = ("PagedLAMB", "PagedLAMB8bit", "PagedCAME")
PAGES = (1 << 22, 1 << 23, 1 << 24, 1 << 25, 1 << 26)


@dataclass
class Bench:
    """One run of this script; `link` is bytes a second each way, `ms` what was found."""

    rec: Recorder
    args: argparse.Namespace
    limit: Limit
    link: float = 0.0

    @property
    def device(self) -> str:
        return str(self.args.device)

    def work(self, work: Work) -> Work:
        return work.smaller(self.args.smaller)

    def value(self, subject: str, metric: str) -> float | None:
        found = [r["value"] for r in self.rec.rows if (r["subject"], r["metric"]) == (subject, metric)]
        return float(found[-1]) if found else None


def per_step(step: Callable[[], Any], finish: Callable[[], Any], times: int, rounds: int = 3) -> float:
    """Milliseconds a step: the median round of so many steps in a row."""
    found = []
    for _ in range(rounds + 1):
        finish()
        start = time.perf_counter()
        for _ in range(times):
            step()
        finish()
        found.append(1e3 * (time.perf_counter() - start) / times)
    return statistics.median(found[1:])


# ----------------------------------------------------------------------------------------------------------------- link


def duplex(device: str, total: int, page: int) -> tuple[float, float, float]:
    """Bytes a second: each way with both busy, in alone, out alone; copies of `page` bytes of pinned memory, none of
    them across the end of a registration."""
    line = lanes.lanes_of(device, 0)
    pool = slabs.Slabs(line)
    sources = [pool.take(total) for _ in range(2)]
    for a in sources:
        a[:] = 1
    pool.pin("duplex")
    ring = torch.empty(2 * page, dtype=torch.uint8, device=device)
    line.begin(0)

    def run(ways: Sequence[int]) -> float:
        line.finish()
        start = time.perf_counter()
        k = 0
        while k < total:
            size = min(page, total - k, *(slabs.CHUNK - (a.ctypes.data + k) % slabs.CHUNK for a in sources))
            if lanes.IN in ways:
                line.copy(lanes.IN, ring.data_ptr(), sources[0].ctypes.data + k, size)
            if lanes.OUT in ways:
                line.copy(lanes.OUT, sources[1].ctypes.data + k, ring.data_ptr() + page, size)
            k += size
        line.finish()
        return total / (time.perf_counter() - start)

    both, into, out = (statistics.median([run(w) for _ in range(5)]) for w in ((0, 2), (0,), (2,)))
    return both, into, out


def link(b: Bench) -> None:
    """The link at several sizes of copies; the best of them is the ceiling."""
    total = (1 << 30) // b.args.smaller
    for page in PAGES:
        both, into, out = duplex(b.device, total, page)
        name = f"copies of {page >> 20} MiB"
        b.rec.add("pinned1g", name, "both_ways", both / 1e9, "GB/s each")
        b.rec.add("pinned1g", name, "in", into / 1e9, "GB/s")
        b.rec.add("pinned1g", name, "out", out / 1e9, "GB/s")
        b.link = max(b.link, both)


# --------------------------------------------------------------------------------------------------------------- paging


def finish(b: Bench, opt: Any) -> Callable[[], Any]:
    def wait() -> None:
        clocks.synchronize(b.device)
        opt._home.finish()

    return wait


def step_time(b: Bench, work: Work, name: str, label: str, **options: Any) -> float:
    """Time and `of_link` of one of ours, in rows; returns milliseconds."""
    params = models.parameters(work, b.device)
    opt = getattr(optim, name)(params, lr=1e-4, **options)
    opt.step()
    states = state_bytes(opt)
    ms = per_step(opt.step, finish(b, opt), 3 if b.args.quick else 20)
    b.rec.add(work.name, label, "ms", ms, "ms")
    rate = states / (ms * 1e-3)
    baseline = f"duplex link {b.link / 1e9:.4g} GB/s"
    b.rec.add(work.name, label, "of_link", rate / 1e9, "GB/s each", baseline, rate / b.link)
    return ms


def paged(b: Bench) -> None:
    """Every state of Llama-1B streamed; then 8-bit AdamW with pages of several sizes, and with everything resident."""
    work = b.work(models.llama1b())
    for name in SUBJECTS:
        tries(b, name, lambda name=name: step_time(b, work, name, name))
    if b.args.quick:
        return
    for page in PAGES:
        label = f"PagedAdamW8bit pages of {page >> 20} MiB"
        tries(b, label, lambda page=page, label=label: step_time(b, work, "PagedAdamW8bit", label, page_bytes=page))
    tries(b, "PagedAdamW8bit all resident", lambda: resident(b, work))


def whole(b: Bench) -> None:
    """Rules that see whole tensors: every state of Llama-1B streamed, a tensor at a time."""
    for name in WHOLE:
        tries(b, name, lambda name=name: step_time(b, b.work(models.llama1b()), name, name))


def resident(b: Bench, work: Work) -> None:
    """What a place costs that has nothing to move."""
    found = {}
    for label, options in (("AdamW8bit", {}), ("PagedAdamW8bit all resident", {"resident_bytes": "auto"})):
        params = models.parameters(work, b.device)
        opt = getattr(optim, label.split()[0])(params, lr=1e-4, **options)
        found[label] = clocks.device_ms(opt.step, b.device, 20, ahead=2.0)
        del opt, params
        clocks.tidy(b.device)
    (_, base), (label, ms) = found.items()
    b.rec.add(work.name, label, "ms", ms, "ms", f"AdamW8bit {base:.4g} ms", base / ms)


# --------------------------------------------------------------------------------------------------------- bitsandbytes


def to_host(x: torch.Tensor) -> None:
    """Send managed pages to the host, in the order of the current stream."""
    from cuda.bindings import runtime

    where = runtime.cudaMemLocation()
    where.type = runtime.cudaMemLocationType.cudaMemLocationTypeHost
    stream = torch.cuda.current_stream().cuda_stream
    (error,) = runtime.cudaMemPrefetchAsync(x.data_ptr(), x.nbytes, where, 0, stream)
    if int(error):
        raise RuntimeError(f"cudaMemPrefetchAsync: {error}")


def bitsandbytes(b: Bench) -> None:
    """Its paged AdamW; after each step its pages go back to the host, as if memory were short and as ours do:
    both ways are in its time, and `ms_in` is the step alone."""
    work = b.work(models.llama1b())
    for name in ("PagedAdamW8bit", "PagedAdamW32bit"):
        tries(b, f"bitsandbytes {name}", lambda name=name: theirs(b, work, name))


def theirs(b: Bench, work: Work, name: str) -> None:
    import bitsandbytes as bnb

    params = models.parameters(work, b.device)
    opt = getattr(bnb.optim, name)(params, lr=1e-4)
    opt.step()
    paged = [opt.state[p].get(key) for p in params for key in ("state1", "state2")]
    paged = [x for x in paged if getattr(x, "is_paged", False)]
    taken = []
    for _ in range(4 if b.args.quick else 9):
        start = time.perf_counter()
        opt.step()
        clocks.synchronize(b.device)
        stepped = time.perf_counter()
        for x in paged:
            to_host(x)
        clocks.synchronize(b.device)
        taken.append((1e3 * (stepped - start), 1e3 * (time.perf_counter() - start)))
    step, ms = map(statistics.median, zip(*taken[1:], strict=True))  # the first one's pages were not driven out before
    b.rec.add(work.name, f"bitsandbytes {name}", "ms_in", step, "ms")
    b.rec.add(work.name, f"bitsandbytes {name}", "ms", ms, "ms")
    ours = {"PagedAdamW8bit": "PagedAdamW8bit", "PagedAdamW32bit": "PagedAdamW"}[name]
    mine = b.value(ours, "ms")
    if mine:
        b.rec.add(work.name, ours, "faster", mine, "ms", f"bitsandbytes {ms:.4g} ms", ms / mine)


# --------------------------------------------------------------------------------------------------------------- memory


def memory(b: Bench) -> None:
    """What the device holds for a model of 7B parameters, weights and gradients in bfloat16, 8-bit states."""
    if b.device == "cpu":
        return
    from refopt import models as shapes

    tries(b, "memory", lambda: held(b, b.work(Work("llama7b", tuple(shapes.named("llama-2-7b").shapes)))))


def held(b: Bench, work: Work) -> None:
    clocks.tidy(b.device)
    torch.empty(1, device=b.device)
    before = torch.cuda.mem_get_info()[0]
    params = models.parameters(work, b.device)
    opt = optim.PagedAdamW8bit(params, lr=1e-4)
    for _ in range(2):
        opt.step()
    clocks.synchronize(b.device)
    used = before - torch.cuda.mem_get_info()[0]
    least = expected(work.shapes)
    label = f"refopt.memory {least / 1e9:.4g} GB"
    b.rec.add(work.name, "PagedAdamW8bit", "memory", used / 1e9, "GB", label, used / least)


def expected(shapes: Sequence[tuple[int, ...]]) -> int:
    """What `refopt.memory` says that the device holds: weights and gradients in bfloat16, and the ring."""
    coded = Optimizer("adamw", {"m": "dynamic8", "v": "dynamic8"})
    blocks = PAGE_BYTES // (memory_of.states(coded, [(coded.block,)]))
    place = places.paged(page_blocks=blocks, buffers=BUFFERS)
    return memory_of.train(shapes, Optimizer("adamw", {"m": "dynamic8", "v": "dynamic8", "p": "bf16"}, place)).total


def tries(b: Bench, label: str, run: Callable[[], Any]) -> None:
    """Measure it, if there is time; what goes wrong is printed, and the next one finds clean memory."""
    if b.args.only and label not in b.args.only:
        return
    if not b.limit.allows(label):
        return
    try:
        run()
    except Exception as error:
        print(f"{label:<34} FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
        traceback.print_exc()
    gc.collect()
    clocks.tidy(b.device)
    if not b.args.dry:
        b.rec.save()


PARTS: dict[str, Callable[[Bench], None]] = {
    "link": link,
    "paged": paged,
    "whole": whole,
    "bitsandbytes": bitsandbytes,
    "memory": memory,
}


def main(argv: Sequence[str] | None = None) -> Bench:
    return launch("gpu_paged", __doc__ or "", PARTS, argv)


def launch(
    bench: str, doc: str, parts: dict[str, Callable[[Bench], None]], argv: Sequence[str] | None, batch: int = 4
) -> Bench:
    """Run the parts that the command line asks for, the link first."""
    parser = arguments(doc)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--parts", type=names, default=tuple(parts), help=f"of {','.join(parts)}; link goes first")
    parser.add_argument("--batch", type=int, default=batch, help="sequences of 2,048 tokens, of parts that train")
    parser.add_argument("--limit", type=float, default=540, help="seconds, after which nothing new begins")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script, with --dry")
    parser.add_argument("--smaller", type=int, default=1, help="divide every side of every tensor, to try the script")
    args = parser.parse_args(argv)
    if unknown := [p for p in args.parts if p not in parts]:
        raise SystemExit(f"no part {', '.join(unknown)}; there are {', '.join(parts)}")
    gpu = args.device == "cuda"
    if not (gpu and args.smaller == 1) and not args.dry:
        raise SystemExit("--device cpu and --smaller are for trying this script: add --dry")
    device = torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}"
    b = Bench(Recorder(bench, device, software(*PACKAGES), args.commit, args.out), args, Limit(args.limit))
    if not args.dry:
        b.rec.check()
    for part in dict.fromkeys(("link", *args.parts)):
        if b.limit.allows(part):
            parts[part](b)
    if not args.dry:
        b.rec.save()
    b.limit.say()
    return b


if __name__ == "__main__":
    main(sys.argv[1:])
