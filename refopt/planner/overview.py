"""The tables of `docs/overview.md`: what a much-copied overview of memory-efficient optimizers says, computed.

    python -m refopt.planner.overview [TABLE]

"7B" are seven billion weights, GB are 1e9 bytes, as there. Each table is a head and rows of text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any, cast

from refopt import memory, models
from refopt.models import Model
from refopt.planner.cards import GIGA, card
from refopt.planner.setups import Setup
from refopt.planner.speed import seconds
from refopt.planner.table import RING, Plan, plan
from refopt.step import Optimizer

Row = tuple[str, ...]
Table = tuple[Row, list[Row]]
BF16 = {"p": "bf16"}
BLOCK = {"m": "bf16", "v": "bf16"}


@cache
def billions(n: float) -> Model:
    """A Llama of so many billion weights."""
    return models.sized(n * 1e9)


def gb(size: float) -> str:
    """Decimal, to a tenth below a hundred."""
    return f"{size / GIGA:.2f}" if size < GIGA else f"{size / GIGA:.1f}" if size < 100 * GIGA else f"{size / GIGA:.0f}"


def breakdown() -> Table:
    """What 7B take, under four conventions: one sequence of 2048 tokens."""
    seven, tokens = billions(7), cast(Any, {"batch": 1, "sequence": 2048})
    forms = {
        "float32": (Optimizer("adam"), False),
        "bfloat16, float32 states": (Optimizer("adam", BF16), False),
        "and a float32 master": (Optimizer("adam", BF16), True),
        "all bfloat16 (torch)": (Optimizer("adam", BF16 | BLOCK), False),
    }
    found = {name: memory.train(seven, opt, master=master, **tokens) for name, (opt, master) in forms.items()}
    eager = {name: memory.moments(seven, opt, blas=0, **tokens)["loss"].activations for name, (opt, _) in forms.items()}
    parts = ("weights", "gradients", "master", "states")
    rows: list[Row] = [(p, *(gb(getattr(n, p)) for n in found.values())) for p in parts]
    rows.append(("activations, transformers", *map(gb, eager.values())))
    sums = (n.weights + n.gradients + n.master + n.states + eager[name] for name, n in found.items())
    return ("GB", *forms), [*rows, ("sum", *map(gb, sums))]


def eight_bit() -> Table:
    """States of Adam on 7B through `dynamic8`."""
    from refopt.codecs import dynamic8

    shapes = billions(7).shapes
    rows: list[Row] = []
    whole = memory.states(Optimizer("adam"), shapes)
    for label, codec in (("32 bits", None), ("8 bits, block 256", dynamic8), ("block 2048", dynamic8(block=2048))):
        size = memory.states(Optimizer("adam", codec, min_size=4096), shapes)
        rows.append((label, gb(size), f"{size / billions(7).size:.3f}", f"{1 - size / whole:.1%}"))
    return ("states", "GB", "bytes a weight", "less by"), rows


def paged() -> Table:
    """What is left on the GPU where Adam's float32 states are paged, weights and gradients in bfloat16."""
    rows: list[Row] = []
    for n in (1, 7, 13, 70):
        need = memory.train(billions(n), Optimizer("adam", BF16))
        rows.append(
            (
                f"{n}B",
                gb(need.states),
                gb(RING),
                gb(need.weights + need.gradients),
                gb(need.weights + need.gradients + RING),
                gb(need.states),
            )
        )
    return ("weights", "states", "ring of pages", "weights, gradients", "on the GPU, paged", "on the host"), rows


def steps() -> Table:
    """One step of AdamW on 7B in bfloat16, float32 and 8-bit states, beside the weights and paged."""
    rows: list[Row] = []
    for name in ("rtx-3090", "rtx-4090", "a100-80gb", "h100"):
        cells = []
        for setup in (
            Setup("full", "bf16", "AdamW"),
            Setup("full", "bf16", "AdamW8bit"),
            Setup("full", "bf16", "AdamW", "paged"),
            Setup("full", "bf16", "AdamW8bit", "paged"),
        ):
            states = memory.states(setup.optimizer(), billions(7).shapes)
            cells.append(1e3 * seconds(setup, card(name), billions(7).size, states))
        rows.append((name, *(f"{ms:,.0f}" for ms in cells), f"{cells[2] / cells[0]:.0f}", f"{cells[3] / cells[1]:.0f}"))
    return ("ms", "AdamW", "AdamW8bit", "PagedAdamW", "PagedAdamW8bit", "ratio, 32 bits", "8 bits"), rows


PER_WEIGHT = {
    "AdamW": ("adamw", None, "resident"),
    "AdamW8bit": ("adamw", "dynamic8", "resident"),
    "AdamW4bit": ("adamw", "q4", "resident"),
    "PagedAdamW": ("adamw", None, "paged"),
    "PagedAdamW8bit": ("adamw", "dynamic8", "paged"),
    "Adafactor": ("adafactor", None, "resident"),
    "Lion": ("lion", None, "resident"),
    "Lion8bit": ("lion", "dynamic8", "resident"),
    "SGD, momentum 0.9": ("sgd", None, "resident"),
}


def per_weight() -> Table:
    """Bytes a weight on the GPU, with and without gradients, and the time of a step beside AdamW's on an H100."""
    seven, h100 = billions(7), card("h100")
    rows: list[Row] = []
    for label, (rule, codec, place) in PER_WEIGHT.items():
        words: Any = {"momentum": 0.9} if rule == "sgd" else {}
        states = memory.states(Optimizer(rule, codec, min_size=4096, **words), seven.shapes)
        kept = (states if place == "resident" else RING) / seven.size
        moves = {"sgd": "Lion"}.get(rule, label.removeprefix("Paged"))  # SGD moves the bytes of Lion
        setup = Setup("full", "bf16", moves, place)
        base = Setup("full", "bf16", "AdamW")
        speed = seconds(base, h100, seven.size, 8 * seven.size) / seconds(setup, h100, seven.size, states)
        cells = (f"{4 + kept:.2f}", f"{8 + kept:.2f}", f"{2 + kept:.2f}", f"{4 + kept:.2f}", f"{speed:.2f}")
        rows.append((label, f"{states / seven.size:.2f}", *cells))
    head = ("class", "states", "float32: p + states", "and g", "bfloat16: p + states", "and g", "speed of the step")
    return head, rows


@cache
def scenario(size: float, gpu: str, method: str = "any", gpus: int = 1) -> Plan:
    """A plan of the decision matrix: one sequence of 512 tokens, checkpoints."""
    return plan(billions(size), gpu, sequence=512, gpus=gpus, method=method, rank=64)


SCENARIOS: dict[str, tuple[float, str, str, int, Setup]] = {
    "7B, 80 GiB": (7, "h100", "any", 1, Setup("full", "bf16", "AdamW")),
    "7B, 24 GiB": (7, "rtx-4090", "any", 1, Setup("full", "bf16", "AdamW8bit")),
    "7B, 16 GiB": (7, "rtx-4080", "any", 1, Setup("lora", "bf16", "AdamW8bit")),
    "70B, 8 x 80 GiB, ZeRO 3": (70, "h100", "any", 8, Setup("full", "bf16", "AdamW8bit")),
    "7B, fine-tuning, 24 GiB": (7, "rtx-4090", "qlora", 1, Setup("qlora", "bf16", "AdamW")),
}
"""Size, card, method, cards, and what the overview recommends."""


def decisions() -> Table:
    """The decision matrix: what was recommended, whether it fits, and what `refopt plan` says."""
    rows: list[Row] = []
    for label, (size, gpu, method, gpus, asked) in SCENARIOS.items():
        found = scenario(size, gpu, method, gpus)
        (row,) = [r for r in found.rows if r.setup == asked]
        best = found.best
        says = f"{best.setup.label}, {gb(best.peak)} GB" if best else "nothing fits"
        fits = "yes" if row.fits else "no"
        rows.append((label, row.setup.label, f"{gb(row.peak)} of {gb(found.run.card.usable)} GB", fits, says))
    return ("scenario", "the overview's", "its peak", "fits", "refopt plan"), rows


def hierarchy() -> Table:
    """7B on one device, in bytes: parts that differ, and the peak of a step on one sequence of 512 tokens."""
    chosen = {
        "QLoRA, r = 64": Setup("qlora", "bf16", "AdamW"),
        "LoRA, r = 64": Setup("lora", "bf16", "AdamW"),
        "PagedAdamW8bit": Setup("full", "bf16_sr", "AdamW8bit", "paged"),
        "AdamW8bit": Setup("full", "bf16", "AdamW8bit"),
        "AdamW, bfloat16 weights": Setup("full", "bf16", "AdamW"),
        "AdamW, float32 weights": Setup("full", "f32", "AdamW"),
    }
    rows: list[Row] = []
    for label, setup in chosen.items():
        (row,) = [r for r in scenario(7, "h100").rows if r.setup == setup]
        p = row.parts
        rows.append((label, gb(p.weights + p.frozen), gb(p.gradients), gb(p.states), gb(row.peak), f"{row.ms:,.1f}"))
    return ("set-up", "weights", "gradients", "states", "peak, GB", "optimizer on an H100, ms"), rows


TABLES: dict[str, Callable[[], Table]] = {
    "breakdown": breakdown,
    "eight-bit": eight_bit,
    "paged": paged,
    "steps": steps,
    "per-weight": per_weight,
    "decisions": decisions,
    "hierarchy": hierarchy,
}
"""By the names that the command takes."""


def markdown(table: Table) -> list[str]:
    """A table of Markdown."""
    head, rows = table
    return ["| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *rows)]


def main(argv: list[str]) -> int:
    """Print one table, or all; 2 for a name that there is not."""
    for name in argv or TABLES:
        if name not in TABLES:
            print(f"refopt.planner.overview: no table {name!r}; there are {', '.join(TABLES)}", file=sys.stderr)
            return 2
        print("\n".join([name, "", *markdown(TABLES[name]()), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
