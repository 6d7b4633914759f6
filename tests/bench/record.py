"""Append rows to docs/bench/results.csv; a row without commit, device and software is refused."""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "bench" / "results.csv"
COLUMNS = (
    "date",
    "commit",
    "device",
    "software",
    "bench",
    "work",
    "subject",
    "metric",
    "value",
    "unit",
    "baseline",
    "ratio",
)


MEASURED = (":(top)", ":(top,exclude)docs/bench")
"""What must be unchanged for a commit to name it: all but the rows and pictures themselves."""


def commit() -> str:
    """The commit of the working tree, or "" where there is no git history or the tree has changes."""
    run = ["git", "-C", str(RESULTS.parent), "status", "--porcelain", "--untracked-files=no", "--", *MEASURED]
    try:
        if subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip():
            return ""
        head = ["git", "-C", str(RESULTS.parent), "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def software(*packages: str) -> str:
    """Versions of the packages a figure depends on, "torch 2.11.0; numba 0.68.1"."""
    out = []
    for name in packages:
        try:
            out.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(out)


@dataclass
class Recorder:
    """Rows of one run of one bench script."""

    bench: str
    device: str
    software: str
    commit: str
    path: Path = RESULTS
    rows: list[dict[str, str]] = field(default_factory=list)
    saved: int = 0

    def add(
        self,
        work: str,
        subject: str,
        metric: str,
        value: float,
        unit: str,
        baseline: str = "",
        ratio: float | None = None,
    ) -> None:
        """One figure; `ratio` is its relation to `baseline`, a ceiling or peer measured in the same process."""
        shown = "" if ratio is None else f"{ratio:.4g}"
        head = (datetime.date.today().isoformat(), self.commit, self.device, self.software, self.bench)
        self.rows.append(
            dict(zip(COLUMNS, (*head, work, subject, metric, f"{value:.6g}", unit, baseline, shown), strict=True))
        )
        print(f"{work:<16} {subject:<34} {metric:<18} {value:>12.6g} {unit:<9} {baseline:<24} {shown}", flush=True)

    def check(self) -> None:
        """ValueError where commit, device or software is unknown."""
        for name in ("commit", "device", "software"):
            if not getattr(self, name):
                raise ValueError(
                    f"record: no {name}; commit your changes, or pass --commit where there is no git history"
                )

    def save(self) -> None:
        """Append every row that is not saved yet. Raises ValueError, and writes none, as `check` does."""
        self.check()
        new = not self.path.exists() or self.path.stat().st_size == 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerows(self.rows[self.saved :])
        self.saved = len(self.rows)


def arguments(description: str) -> argparse.ArgumentParser:
    """The options every bench script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--commit", default=commit(), help="commit that is measured (default: git's, if nothing is changed)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where rows are appended")
    parser.add_argument("--dry", action="store_true", help="print, record nothing")
    parser.add_argument("--only", type=names, default=(), metavar="SUBJECT,...", help="measure these alone")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions and subjects")
    return parser


def names(text: str) -> tuple[str, ...]:
    """The words between commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


class Limit:
    """Seconds that a script may take: it begins nothing afterwards, and says at the end what it left out."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds
        self.left_out: list[str] = []

    def allows(self, what: str, seconds: float = 0) -> bool:
        """Whether there is time to begin something that takes so long."""
        if time.monotonic() + seconds < self.end:
            return True
        self.left_out.append(what)
        return False

    def say(self) -> None:
        if self.left_out:
            print(f"left out, no time: {'; '.join(self.left_out)}", flush=True)
