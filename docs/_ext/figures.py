"""The table of the landing page and of the README, out of docs/bench/results.csv. Needs nothing but Python.

`python docs/_ext/figures.py` prints it as Markdown.
"""

from __future__ import annotations

import csv
from pathlib import Path

PATH = Path(__file__).parents[1] / "bench" / "results.csv"
Row = dict[str, str]

SUBJECTS = {
    "AdamW8bit": "`AdamW8bit`",
    "AdamW8bit + bf16_rem16": "`AdamW8bit`, weights `bf16_rem16`",
    "AdamW4bit": "`AdamW4bit`",
    "Lion8bit": "`Lion8bit`",
    "AdamW": "`AdamW`, states of 32 bits",
    "torch AdamW fused": "torch's fused `AdamW`, states of 16 bits",
    "FlashOptim FlashAdamW 24-bit": "FlashOptim's `FlashAdamW`",
    "bitsandbytes AdamW8bit": "bitsandbytes' `AdamW8bit`",
}
HEAD = ("optimizer", "ms", "bytes of state a parameter", "of the speed of a copy")


def rows(path: Path = PATH) -> list[Row]:
    """All rows, oldest first."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def newest(found: list[Row], device: str, subject: str, metric: str) -> Row:
    """The last row of one figure. Raises LookupError where there is none."""
    for row in reversed(found):
        wanted = ("gpu_optim", "llama1b", device, subject, metric)
        if tuple(row[n] for n in ("bench", "work", "device", "subject", "metric")) == wanted:
            return row
    raise LookupError(f"results.csv has no {metric} of {subject} on {device}")


def measured(found: list[Row], device: str = "NVIDIA H100 80GB HBM3") -> list[tuple[str, ...]]:
    """One line an optimizer: milliseconds, bytes of state a parameter, per cent of a copy."""
    lines = []
    for subject, name in SUBJECTS.items():
        ms, state = (float(newest(found, device, subject, metric)["value"]) for metric in ("ms", "state"))
        copy = float(newest(found, device, subject, "of_copy")["ratio"])
        lines.append((name, f"{ms:.2f}", f"{state:.3g}", f"{100 * copy:.0f} %"))
    return lines


def grid(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *lines)]


if __name__ == "__main__":
    print("\n".join(grid(HEAD, measured(rows()))))
