"""States on disk beside the disk: the rate of a step's reads and writes, and that of nothing but reads and writes.

    python -m tests.bench.gpu_disk --folder /scratch [--rounds 5] [--quick] [--commit HASH]

raw     bytes a second, read and written together: the same pages as a step's, direct, by as many threads, synced at the
        end; nothing is computed and no checksum is made
ms      a step, until its stamp is durable; steps and raw rounds take turns, medians of each
of_raw  (bytes of pages read + written / ms) / raw
buffers host memory that pages pass through

The directory should be on the disk that is meant, with room for four times the states (8-bit AdamW of Llama-1B: 10 GB).
With kvikio installed there are rows of both ways. With --device cpu --smaller 8 --dry the script can be tried without a
GPU.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refopt_cuda import optim
from refopt_cuda.places import disk, files, vault
from tests.bench import clocks, models
from tests.bench.models import Work
from tests.bench.record import Limit, Recorder, arguments, software

PACKAGES = ("torch", "cupy-cuda13x", "numpy", "kvikio-cu13")


class Raw:
    """Two versions of every page in one file, read and written as a step does it, without the step."""

    def __init__(self, folder: Path, rooms: Sequence[int], gpu: bool) -> None:
        self.rooms, self.turn = rooms, 0
        self.file = files.opened(folder / "raw.bin", gpu=gpu)
        self.file.reserve(2 * sum(rooms))
        self.buffers = [files.buffer(max(rooms)) for _ in range(disk.BUFFERS)]
        for buffer in self.buffers:
            buffer[:] = np.random.default_rng(0).integers(0, 256, buffer.size, np.uint8)
        self.pool = ThreadPoolExecutor(vault.THREADS)

    def step(self) -> None:
        """Every page read once and written once: the first half of the buffers ahead, the other behind."""
        starts = [2 * at for at in np.cumsum([0, *self.rooms]).tolist()]
        pages = [*zip(starts, self.rooms, strict=False)]
        reads, writes, count = dict[int, Future[Any]](), dict[int, Future[Any]](), len(self.buffers)

        def fetch(k: int) -> None:
            if k < len(pages):
                if k - count in writes:
                    writes[k - count].result()
                at, room = pages[k]
                reads[k] = self.pool.submit(self.file.read, self.buffers[k % count][:room], at + self.turn * room)

        for k in range(count // 2):
            fetch(k)
        for k, (at, room) in enumerate(pages):
            reads[k].result()
            there = at + (1 - self.turn) * room
            writes[k] = self.pool.submit(self.file.write, self.buffers[k % count][:room], there)
            fetch(k + count // 2)
        for future in writes.values():
            future.result()
        self.file.sync()
        self.turn = 1 - self.turn

    def close(self) -> None:
        self.pool.shutdown()
        self.file.close()
        self.file.path.unlink()


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextmanager
def through(kvikio: bool) -> Iterator[None]:
    """With kvikio, or without."""
    files.KVIKIO, before = kvikio, files.KVIKIO
    try:
        yield
    finally:
        files.KVIKIO = before


def measured(rec: Recorder, args: argparse.Namespace, work: Work, folder: Path, label: str, gpu: bool) -> None:
    """Steps and raw rounds in turns, and rows of both."""
    params = models.parameters(work, args.device)
    opt: Any = optim.AdamW8bit(params, lr=1e-4, place="disk", path=folder / "states")

    def step() -> None:
        opt.step()
        clocks.synchronize(args.device)
        opt._home.finish()

    for _ in range(2):  # the first makes the states, the second reads them for the first time
        step()
    rooms = [record.room for record in opt._home.records.values()]
    moved = 2 * sum(rooms)
    steps, raws = list[float](), list[float]()
    with closing(Raw(folder, rooms, gpu)) as raw:
        for _ in range(2):
            raw.step()
        for _ in range(2 if args.quick else args.rounds):
            raws.append(seconds(raw.step))
            steps.append(seconds(step))
        raws.append(seconds(raw.step))
    rate, ceiling = moved / statistics.median(steps), moved / statistics.median(raws)
    (desk,) = opt._home.desks.values()
    rec.add(work.name, label, "raw", ceiling / 1e9, "GB/s")
    rec.add(work.name, label, "ms", 1e3 * statistics.median(steps), "ms")
    rec.add(work.name, label, "of_raw", rate / 1e9, "GB/s", f"raw {ceiling / 1e9:.4g} GB/s", rate / ceiling)
    rec.add(work.name, label, "buffers", sum(b.size for b in desk.buffers) / 1e6, "MB")
    print(f"{'':<16} steps {[round(s, 2) for s in steps]} s, raw {[round(s, 2) for s in raws]} s", flush=True)


def main(argv: Sequence[str] | None = None) -> Recorder:
    parser = arguments(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk that is measured")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--limit", type=float, default=400, help="seconds, after which nothing new begins")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the script, with --dry")
    parser.add_argument("--smaller", type=int, default=1, help="divide every side of every tensor, to try the script")
    args = parser.parse_args(argv)
    gpu = args.device == "cuda"
    if not (gpu and args.smaller == 1) and not args.dry:
        raise SystemExit("--device cpu and --smaller are for trying this script: add --dry")
    device = torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}"
    rec, limit = Recorder("gpu_disk", device, software(*PACKAGES), args.commit, args.out), Limit(args.limit)
    if not args.dry:
        rec.check()
    ways = {"AdamW8bit disk": False} | ({"AdamW8bit disk kvikio": True} if gpu and files._kvikio() else {})
    for label, kvikio in ways.items():
        if (args.only and label not in args.only) or not limit.allows(label):
            continue
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, through(kvikio):
            measured(rec, args, models.llama1b().smaller(args.smaller), Path(folder), label, gpu)
        clocks.tidy(args.device)
        if not args.dry:
            rec.save()
    limit.say()
    return rec


if __name__ == "__main__":
    main(sys.argv[1:])
