"""Predicted milliseconds beside every measured row of one H100, and measured peaks beside predicted ones."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from refopt import memory, models
from refopt.planner import Run, Setup, card
from refopt.planner.setups import setups
from refopt.planner.speed import LINK, seconds, untimed
from refopt.planner.table import row

BENCH = Path(__file__).parents[2] / "docs/bench"
ONE = models.named("llama-3.2-1b")
FULL = {
    name: Setup("full", "bf16", name)
    for name in ("AdamW", "AdamW8bit", "AdamWFp8", "AdamW4bit", "Lion8bit", "AdEMAMix8bit", "Adafactor", "CAME", "LAMB")
}
FULL |= {f"Paged{n}": Setup("full", "bf16", n, "paged") for n in ("AdamW", "AdamW8bit", "AdamW4bit", "Lion8bit")}
FULL["AdamW8bit + bf16_rem16"] = Setup("full", "bf16_rem16", "AdamW8bit")


PAGES = 0.95
"""Part of the link's own rate, both ways at once, that pages reach."""


def measured() -> dict[str, float]:
    """The newest milliseconds of each subject over Llama-3.2-1B's tensors on an H100. Links of H100s differ by more
    than a tenth from machine to machine: those of pages are what they would be over the card's, by the link's own rate
    in the same run."""
    out, links = dict[str, float](), dict[str, float]()
    with (BENCH / "results.csv").open(encoding="utf-8", newline="") as file:
        for r in csv.DictReader(file):
            if r["bench"] not in ("gpu_optim", "gpu_paged") or r["device"] != "NVIDIA H100 80GB HBM3":
                continue
            if r["bench"] == "gpu_paged" and r["metric"] == "both_ways":
                links[r["commit"]] = max(float(r["value"]), links.get(r["commit"], 0.0))
            if (r["work"], r["metric"]) == ("llama1b", "ms"):
                link = PAGES * links[r["commit"]] * 1e9 if r["bench"] == "gpu_paged" else 0.0
                out[r["subject"]] = float(r["value"]) * (link / (LINK * card("h100").link) if link else 1.0)
    return out


def test_the_link_is_that_of_the_machines_that_were_measured() -> None:
    """Within a tenth, in the middle: the best rate of a run is over one machine's link."""
    best = dict[tuple[str, str], float]()
    with (BENCH / "results.csv").open(encoding="utf-8", newline="") as file:
        for r in csv.DictReader(file):
            if r["metric"] == "both_ways" and r["device"] == "NVIDIA H100 80GB HBM3":
                run = r["bench"], r["commit"]
                best[run] = max(float(r["value"]), best.get(run, 0.0))
    assert len(best) >= 5
    assert LINK * card("h100").link / 1e9 == pytest.approx(PAGES * statistics.median(best.values()), rel=0.1)


@pytest.mark.parametrize("name", FULL)
def test_a_step_takes_what_was_predicted_within_a_tenth(name: str) -> None:
    setup = FULL[name]
    said = 1e3 * seconds(setup, card("h100"), ONE.size, memory.states(setup.optimizer(), ONE.shapes))
    assert said == pytest.approx(measured()[name], rel=0.1)


def test_a_time_is_predicted_or_it_is_said_why_not() -> None:
    """Never where products take the time, nor beside a class that nobody has measured."""
    said = {s.name for s in setups() if not untimed(s)}
    assert said <= {name.removeprefix("Paged").partition(" ")[0] for name in FULL} | {"Lion", "Lion4bit", "AdEMAMix"}
    assert {s.rule for s in setups() if untimed(s)} > {"muon", "galore", "apollo", "adam_mini", "sm3"}


def peaks() -> list[dict[str, Any]]:
    """What `tests/bench/gpu_peaks.py` has measured."""
    paths = BENCH / "peaks.json", BENCH / "peaks_more.json"
    return [row for path in paths for row in json.loads(path.read_text("utf-8"))["rows"]]


def test_the_peak_of_every_measured_training_was_predicted_within_three_percent() -> None:
    from tests.bench.gpu_peaks import Case

    wrong = []
    for found in peaks():
        case = Case(**found["case"])
        ratio = found["measured"]["peak"] / case.said.peak
        if not 0.97 < ratio < 1.03:
            wrong.append(f"{case.label}: {ratio:.3f}")
    assert not wrong, "; ".join(wrong)
    assert len(peaks()) >= 34


def test_the_recorded_peak_of_qlora_was_predicted_within_three_percent() -> None:
    """`tests/bench/gpu_nf4.py` has measured QLoRA of 7B on one sequence of 512 tokens."""
    with (BENCH / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["work"], r["metric"]) == ("qlora7b", "peak_bytes")]
    run = Run(models.named("llama-2-7b"), card("h100"), 1, 512, True, 64)
    said = row(run, Setup("qlora", "bf16", "AdamW")).peak
    assert float(rows[-1]["value"]) / said == pytest.approx(1, abs=0.03)
