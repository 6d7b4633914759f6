"""`refopt train`: the command line of the main job."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from refopt_cuda.train import plan as plans
from refopt_cuda.train import report, sharded
from refopt_cuda.train.errors import InputError
from refopt_cuda.train.job import Job, Result, Stop, folder_for, folder_to_resume
from refopt_cuda.train.loop import Stopped
from refopt_cuda.train.subjects import DEFAULT

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
INTERRUPTED = 130


def many(argv: list[str], options: tuple[str, ...] = ("--text", "--optimizers")) -> list[str]:
    """`--text a b c` as `--text a --text b --text c`."""
    out: list[str] = []
    inside = ""
    for word in argv:
        if word.startswith("-"):
            inside = word if word in options else ""
        elif inside and out[-1] != inside:
            out.append(inside)
        out.append(word)
    return out


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def train(
    optimizers: Annotated[list[str] | None, typer.Option(help=f"what is compared [{' '.join(DEFAULT)}]")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="UTF-8 files [Python's standard library]")] = None,
    steps: Annotated[int | None, typer.Option(help="steps of each run")] = None,
    batch: Annotated[int | None, typer.Option(help="sequences in a batch")] = None,
    context: Annotated[int | None, typer.Option(help="bytes in a sequence")] = None,
    layers: Annotated[int | None, typer.Option(help="layers of the transformer")] = None,
    width: Annotated[int | None, typer.Option(help="width of the transformer")] = None,
    heads: Annotated[int | None, typer.Option(help="attention heads")] = None,
    hidden: Annotated[int | None, typer.Option(help="hidden width of the feed-forward part")] = None,
    lr: Annotated[
        float | None, typer.Option(help="highest learning rate of AdamW; other rules take a multiple")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="train with so many seeds, and compare in pairs")] = None,
    samples: Annotated[int | None, typer.Option(help="steps of each run that the NumPy reference takes again")] = None,
    place: Annotated[
        str | None,
        typer.Option(help="where our optimizers keep states: resident, paged, host, auto or disk [resident]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda [cuda where there is one]")] = None,
    deterministic: Annotated[bool | None, typer.Option(help="the same bits every time, on a GPU too [yes]")] = None,
    name: Annotated[str | None, typer.Option(help="the folder in runs/ [date and time]")] = None,
    shard: Annotated[
        bool, typer.Option("--sharded", help="under torchrun: weights, gradients and states over all ranks (FSDP2)")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on with a stopped job: the newest, or --name")] = False,
) -> None:
    """Train a small transformer on real text, once per optimizer: the same first weights, the same batches.

    Ends with a table, runs/NAME/report.html, metrics.csv and a checkpoint a run. Ctrl-C saves; --resume goes on to the
    same bits.
    """
    if seeds is not None and seeds < 1:
        raise InputError(f"--seeds must be at least 1, got {seeds}")
    given: dict[str, Any] = {
        "optimizers": tuple(optimizers) if optimizers else None,
        "text": tuple(str(p.resolve()) for p in text) if text else None,
        "seeds": tuple(range(seeds)) if seeds else None,
        "deterministic": deterministic,
        "device": device,
    }
    given |= {"steps": steps, "batch": batch, "context": context, "layers": layers, "width": width, "heads": heads}
    given |= {"hidden": hidden, "lr": lr, "samples": samples, "place": place}
    ranks = sharded.begin(device) if shard else 0
    alike = sharded.same if ranks else lambda make: make()
    if ranks:
        given |= {"ranks": ranks, "samples": samples or 0}
    if resume:
        for option, value in given.items():
            if value is not None and not (ranks and option in ("ranks", "samples", "device")):
                raise InputError(f"--resume goes on with the plan of the run; leave out --{option}")
        job = Job.resumed(alike(lambda: folder_to_resume(name)))
        if job.plan.ranks and not ranks:
            raise InputError("--resume: the run is sharded; go on under torchrun, with --sharded")
        job.plan = replace(job.plan, ranks=ranks)
    else:
        job = Job(*alike(lambda: (folder_for(name), plans.make(given))))
    raise typer.Exit(carry_out(job))


def carry_out(job: Job) -> int:
    """Train, print, write the report; returns the exit code."""
    console = Console(quiet=not sharded.first())
    _determine(job.plan)
    try:
        job.begin()
    except OSError as error:
        raise InputError(f"{job.folder} cannot be written: {error.strerror}") from None
    console.print(report.heading(job))
    stop, results = Stop(), list[Result]()
    with stop.listening():
        try:
            for result in job.run(console, stop):
                results.append(result)
                console.print(report.line(result))
        except Stopped:
            console.print(f"Saved in {job.folder}. Go on with: refopt train --resume --name {job.folder.name}")
            return INTERRUPTED
    if not sharded.first():
        return 0
    job.write_metrics(results)
    report.show(console, job, results)
    return 0


def _determine(plan: plans.Plan) -> None:
    if plan.device == "cuda" and plan.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if plan.device == "cuda":
        torch.set_float32_matmul_precision("high")


def main(argv: list[str]) -> int:
    """Run the command; 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    try:
        app(many(argv), prog_name="refopt train")
    except SystemExit as end:
        return int(end.code or 0)
    except InputError as error:
        print(f"refopt train: {error}", file=sys.stderr)
    except torch.OutOfMemoryError:
        print("refopt train: the GPU has not enough free memory; try a smaller --batch", file=sys.stderr)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        sharded.end()
    return 2
