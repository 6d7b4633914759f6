"""`refopt plan`: which optimizer fits a model on a GPU, as a table, a recommendation and lines to copy."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from refopt import models
from refopt.planner import advice
from refopt.planner.cards import CARDS, GIGA
from refopt.planner.setups import METHODS
from refopt.planner.speed import HOST
from refopt.planner.table import SLACK, Plan, Row, gigabytes, plan

PARTS = ("weights", "frozen", "gradients", "master", "states", "scratch", "activations")
HEAD = ("row", "method", "weights", "class", "grads", *PARTS, "peak", "host", "fits", "ms")
SHOWN = 16
"""Rows unless all are asked for."""
WIDE, LEFT = 120, 5
"""Columns of text, and how many of the table are words."""


def parser() -> argparse.ArgumentParser:
    """Its options."""
    out = argparse.ArgumentParser(prog="refopt plan", description=(__doc__ or "").partition(": ")[2])
    which = out.add_mutually_exclusive_group(required=True)
    which.add_argument("--params", type=float, help="weights, such as 7e9: a Llama of that size")
    which.add_argument("--model", help=f"a config.json of transformers, its folder, or {', '.join(models.MODELS)}")
    out.add_argument("--gpu", required=True, help=f"a size such as 24GB or 24GiB, or {', '.join(CARDS)}")
    out.add_argument("--gpus", type=int, default=1, help="devices [1]")
    out.add_argument("--zero", type=int, choices=range(4), help="ZeRO's stage [3 where there are several devices]")
    out.add_argument("--batch", type=int, default=1, help="sequences of a step on one device [1]")
    out.add_argument("--sequence", type=int, default=2048, help="tokens of each [2048]")
    out.add_argument("--checkpoint", action=argparse.BooleanOptionalAction, default=True, help="[yes]")
    out.add_argument("--rank", type=int, default=16, help="of adapters [16]")
    out.add_argument("--method", default="any", choices=("any", *METHODS))
    out.add_argument("--host-bandwidth", type=float, default=HOST / GIGA, help="GB/s of the host's memory [100]")
    out.add_argument("--row", type=int, help="one row of the table: its class, what changes, lines to copy")
    out.add_argument("--all", action="store_true", help="every row, also those that do not fit")
    out.add_argument("--json", action="store_true", help="everything, as JSON")
    out.add_argument("--plot", metavar="FILE", help="draw the rows as stacked bars, .png or .svg (matplotlib)")
    return out


def main(argv: list[str]) -> int:
    """`refopt plan (--params N | --model NAME) --gpu GPU`: 0, 1 if nothing fits, 2 for input that cannot be used."""
    args = parser().parse_args(argv)
    try:
        found = plan(
            model(args),
            args.gpu,
            batch=args.batch,
            sequence=args.sequence,
            checkpoint=args.checkpoint,
            rank=args.rank,
            gpus=args.gpus,
            zero=args.zero,
            method=args.method,
            host_bandwidth=args.host_bandwidth * GIGA,
        )
        rows = shown(found, args.all)
        if args.row is not None and not 1 <= args.row <= len(found.rows):
            raise ValueError(f"--row must be 1 to {len(found.rows)}, got {args.row}")
        if args.plot:
            from refopt.planner.picture import save

            save(found, rows, Path(args.plot))
    except (ValueError, OSError) as error:
        print(f"refopt plan: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"refopt plan needs {error.name}, which is not installed: pip install matplotlib", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(found), indent=1))
    elif args.row is not None:
        print("\n".join([*heading(found), *described(found.rows[args.row - 1])]))
    else:
        print("\n".join(text(found, rows)))
    return 0 if found.best else 1


def model(args: argparse.Namespace) -> models.Model | str:
    """The model that was asked for, or what it is called."""
    if args.params is not None:
        return models.sized(args.params)
    return str(args.model)


def shown(found: Plan, every: bool) -> list[Row]:
    """Rows to print: what fits, those that give up least first, the best of each method among them."""
    if every:
        return list(found.rows)
    first = found.fitting[:SHOWN]
    bests = [found.best_of(method) for method in METHODS]
    further = [row for row in bests if row is not None and row not in first]
    return first + further if first else sorted(found.rows, key=lambda row: row.peak)[:3]


def cells(number: int, row: Row) -> tuple[str, ...]:
    """One line of the table, decimal GB."""
    s, parts = row.setup, [gigabytes(getattr(row.parts, part)) if getattr(row.parts, part) else "-" for part in PARTS]
    host = gigabytes(row.parts.host) if row.parts.host else "-"
    label = f"{s.name} (host)" if s.place == "host" else s.shown
    took = "-" if row.ms is None else f"{row.ms:.1f}"
    ends = (gigabytes(row.peak), host, "yes" if row.fits else "no", took)
    return str(number), s.method, s.stored, label, "freed" if s.release else "kept", *parts, *ends


def table(found: Plan, rows: list[Row]) -> list[str]:
    """Columns as wide as what is in them; numbers to the right."""
    lines = [HEAD, *(cells(found.rows.index(row) + 1, row) for row in rows)]
    wide = [max(len(line[k]) for line in lines) for k in range(len(HEAD))]
    return [
        "  ".join(c.ljust(w) if k < LEFT else c.rjust(w) for k, (c, w) in enumerate(zip(line, wide))) for line in lines
    ]


def heading(found: Plan) -> list[str]:
    """What is trained on what, and what was assumed."""
    run, c = found.run, found.run.card
    name = run.model.name if isinstance(run.model, models.Model) else "shapes"
    tokens = f"batch {run.batch} x {run.sequence} tokens, checkpoints {'on' if run.checkpoint else 'off'}"
    tokens = tokens if run.known else "no tokens: its blocks are not known"
    many = f", {run.gpus} devices, ZeRO {run.stage}" if run.gpus > 1 else ""
    speeds = f"{c.bandwidth / 1e9:,.0f} GB/s, link {c.link / 1e9:,.0f} GB/s each way"
    like = f", as an {c.like}" if c.like else ""
    return [
        f"{name}, {run.size:,} weights; {tokens}{many}",
        f"{c.name}: {gigabytes(c.memory)} GB, {gigabytes(c.usable)} of them for tensors; {speeds}{like}",
        "",
    ]


def text(found: Plan, rows: list[Row]) -> list[str]:
    """The whole answer."""
    out = [*heading(found), *table(found, rows), ""]
    out.append("GB (1e9 bytes) of one device: each part at its largest, which is not at one time; peak: the largest")
    out.append(
        f"moment. It fits if peak x {SLACK} does. ms: a step of the optimizer, predicted; -: --row N says why not."
    )
    left = len(found.rows) - len(rows)
    out.append(f"{f'{left} rows are not shown: --all. ' if left else ''}Class, changes and lines of any row: --row N.")
    return [*out, "", *recommended(found)]


def recommended(found: Plan) -> list[str]:
    """Which row to take, why, what changes, and the lines to copy."""
    best = found.best
    if best is None:
        least = min(found.rows, key=lambda row: row.peak)
        says = f"Nothing fits. Closest: {least.setup.label}, peak {gigabytes(least.peak)} GB (at: {least.moment})."
        return [says, "Try a smaller --batch or --sequence, --checkpoint, --method qlora, or --gpus N --zero 3."]
    out = ["Of what fits, this gives up least:", *described(best)]
    for method in METHODS:
        other = found.best_of(method)
        if other is not None and other is not best:
            out.append(f"Or {other.setup.label}: peak {gigabytes(other.peak)} GB; --method {method}")
    return out


def described(row: Row) -> list[str]:
    """One row: its peak, what is given up, what changes, where its class is documented, the lines to copy."""
    fits = "" if row.fits else ", which does not fit"
    took = f"{row.ms:.1f} ms a step" if row.ms is not None else f"time not predicted: {row.untimed}"
    out = textwrap.wrap(f"{row.setup.label}: peak {gigabytes(row.peak)} GB{fits} (at: {row.moment}), {took}.", WIDE)
    why = [f"Given up: {'; '.join(advice.given_up(row.setup)) or 'nothing'}."]
    why += [f"Coming from AdamW: {line}." for line in advice.changes(row.setup)]
    out += [line for long in why for line in textwrap.wrap(long, WIDE, subsequent_indent="  ")]
    lines = "Its lines; `model` is yours, of transformers, and `batch` a dict of what it takes:"
    return [*out, f"Its page: {row.page}", lines, "", *row.snippet.splitlines(), ""]


def as_json(found: Plan) -> dict[str, Any]:
    """All rows, and what they are about."""
    run = found.run
    name = run.model.name if isinstance(run.model, models.Model) else None
    about = {"model": name, "weights": run.size, "batch": run.batch, "sequence": run.sequence}
    about |= {"checkpoint": run.checkpoint, "rank": run.rank, "gpus": run.gpus, "zero": run.stage}
    best = found.best
    advised = best and best.json() | {"given_up": advice.given_up(best.setup), "changes": advice.changes(best.setup)}
    device = run.card._asdict() | {"usable": run.card.usable}
    return {"run": about, "gpu": device, "best": advised, "rows": [row.json() for row in found.rows]}
