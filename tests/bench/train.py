"""Record a finished `refopt train` job: what every optimizer of runs/NAME came to.

refopt train --name demo && python -m tests.bench.train demo [--commit HASH]
"""

from __future__ import annotations

import platform

import torch
from rich.console import Console

from refopt_cuda.train import report
from refopt_cuda.train.job import Job, Result, Stop, folder_to_resume
from tests.bench.record import Recorder, arguments, software


def results(job: Job) -> list[Result]:
    """What the job's checkpoints hold. Raises Stopped where a run has not ended."""
    stop = Stop()
    stop.asked = True
    return list(job.run(Console(quiet=True), stop))


def record(rec: Recorder, job: Job, results: list[Result]) -> None:
    """Rows for every run; `work` says how large the model is and what it was trained with."""
    p = job.plan
    work = f"bytes{p.sizes.parameters() / 1e6:.1f}m-{p.steps}x{p.batch}x{p.context}"
    for r in results:
        subject = r.subject.name if len(p.seeds) == 1 else f"{r.subject.name} seed {r.seed}"
        count = p.sizes.parameters()
        rec.add(work, subject, "loss", r.record.heldout, "nats/byte")
        rec.add(work, subject, "state_bytes", r.record.state_bytes, "bytes")
        rec.add(work, subject, "bytes_per_param", r.record.state_bytes / count, "bytes")
        rec.add(work, subject, "step_ms", r.step_ms, "ms")
        rec.add(work, subject, "tokens_per_s", r.tokens_per_second, "1/s")
        rec.add(work, subject, "peak_bytes", r.record.peak_bytes, "bytes")
        if r.record.replayed and not r.subject.torchs:
            equal = r.record.equal / r.record.replayed
            rec.add(work, subject, "equal_steps", r.record.equal, "steps", "sampled steps", equal)
    for pair in report.differences(results):
        subject = f"{pair.name} - {pair.baseline}"
        rec.add(work, subject, "bits_difference", pair.mean, "bits/byte", "95 % interval +-", pair.half)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("name", help="the folder in runs/")
    args = parser.parse_args()
    job = Job.resumed(folder_to_resume(args.name))
    gpu = job.plan.device == "cuda"
    device = torch.cuda.get_device_name() if gpu else f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    versions = software("torch", "numpy", *(["cupy-cuda13x"] if gpu else ["numba"]))
    rec = Recorder("train", device, versions, args.commit, args.out)
    record(rec, job, [r for r in results(job) if not args.only or r.subject.name in args.only])
    if not args.dry:
        rec.save()


if __name__ == "__main__":
    main()
