"""Pictures and the page on convergence, from a few rows: what is there is drawn, what is not is said."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.bench import convergence, record

pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
from tests.bench import plots

JOB = "bytes124.1m-400x64x256"
TUNED = "smollm2-135m-kjv-200x8x512"


def rows(path: Path, *found: tuple[str, str, str, str, float, float | None]) -> Path:
    """A csv of (bench, work, subject, metric, value, ratio)."""
    for bench, work, subject, metric, value, ratio in found:
        rec = record.Recorder(bench, "a device", "torch 1", "abc", path)
        rec.add(work, subject, metric, value, "", "", ratio)
        rec.save()
    return path


def few(path: Path) -> Path:
    g = "gpu_optim"
    speeds = [(g, "llama1b", s, "of_copy", 1.0, r) for s, r in (("AdamW8bit", 0.9), ("torch AdamW fused", 0.6))]
    small = [(g, "lora7b", "AdamW8bit", m, v, None) for m, v in (("ms", 0.2), ("wall_ms", 0.4))]
    large = [(g, f"flat{n}", "AdamW", "ms", v, None) for n, v in (("1m", 0.01), ("268m", 2.2), ("4b", 35.0))]
    blocks = [(g, "flat268m", f"AdamW8bit block {b}", "of_copy", 1.0, 0.9) for b in (64, 2048)]
    ends = [("torch.AdamW", 1.50), ("AdamW8bit", 1.51)]
    runs = [("convergence", JOB, f"{s} seed {k}", "loss", v + k / 100, None) for s, v in ends for k in range(3)]
    curve = [("convergence", JOB, f"{s} seed {k}", "loss at 40", 3.0, None) for s, _ in ends for k in range(3)]
    return rows(path, *speeds, *small, *large, *blocks, *runs, *curve, *tuned())


def tuned() -> list[tuple[str, str, str, str, float, None]]:
    """Three ways, three seeds: (after, before, trained, frozen bytes)."""
    out: list[tuple[str, str, str, str, float, None]] = []
    for way, values in (
        ("qlora", (2.5, 3.4, 100, 70e6)),
        ("lora", (2.4, 3.3, 100, 500e6)),
        ("full", (2.3, 3.3, 900, 0)),
    ):
        for k in range(3):
            metrics = dict(zip(("loss", "loss before", "trained", "frozen_bytes"), values, strict=True))
            metrics |= {"s_per_step": 0.25, "peak_bytes": 2e9, "training loss at 20": 3.0, "training loss at 40": 2.8}
            metrics["loss"] += k / 100
            out += [("finetune", TUNED, f"{way} seed {k}", m, v, None) for m, v in metrics.items()]
    return out


def test_every_picture_is_drawn_the_same_bytes_each_time(tmp_path: Path) -> None:
    path, first, again = few(tmp_path / "r.csv"), tmp_path / "a", tmp_path / "b"
    first.mkdir()
    again.mkdir()
    names = {p.name for p in plots.draw(path, first)}
    plots.draw(path, again)
    assert names == {f"{name}.svg" for name in plots.PICTURES}
    for name in names:
        text = (first / name).read_text("utf-8")
        assert text == (again / name).read_text("utf-8") and "abc" in text and "<svg" in text
        assert ("4-bit once" in text) == (name == "finetune.svg")


def test_what_has_no_rows_is_not_drawn(tmp_path: Path, capsys: Any) -> None:
    path = rows(tmp_path / "r.csv", ("gpu_optim", "llama1b", "AdamW8bit", "of_copy", 1.0, 0.9))
    assert [p.name for p in plots.draw(path, tmp_path)] == ["of_copy.svg"]
    assert "convergence: no rows yet" in capsys.readouterr().out
    assert plots.draw(tmp_path / "none.csv", tmp_path) == []


def test_pictures_show_the_newest_row_of_the_newest_device(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    one = ("gpu_optim", "llama1b", "AdamW", "of_copy", 1.0)
    rows(path, (*one, 0.1), (*one, 0.7))
    found = plots.newest(plots.read(path), "gpu_optim", "of_copy")
    assert found["llama1b", "AdamW"]["ratio"] == "0.7"
    with path.open("a", newline="") as file:
        last = {**found["llama1b", "AdamW"], "device": "another", "ratio": "0.2", "subject": "Lion8bit"}
        csv.DictWriter(file, record.COLUMNS, lineterminator="\n").writerow(last)
    assert list(plots.newest(plots.read(path), "gpu_optim", "of_copy")) == [("llama1b", "Lion8bit")]


@pytest.mark.parametrize(("work", "millions"), [("flat1m", 1), ("flat268m", 268), ("flat4b", 4000)])
def test_sizes_are_read_from_names(work: str, millions: float) -> None:
    assert plots.millions(work) == millions


# ----------------------------------------------------------------------------------------------------- the page's table


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """docs/_ext/results.py, as Sphinx loads it: its neighbours can be imported."""
    pytest.importorskip("sphinx", reason="needs Sphinx: pip install 'refopt[docs]'")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "docs" / "_ext")
    return importlib.import_module("results")


def test_the_page_says_mean_noise_and_difference_in_pairs(results: ModuleType, tmp_path: Path) -> None:
    said, _, _, _, base, ours = results.convergence(plots.read(few(tmp_path / "r.csv")))
    assert JOB in said and "Not all runs are there yet" in said
    assert base.startswith("| `torch.AdamW` | 1.5100 | 0.0100 | 3 |")
    assert "| `AdamW8bit` | 1.5200 | 0.0100 | 3 | +0.0100 ± 0.0000 |" in ours


def test_the_page_on_fine_tuning_says_before_after_and_the_difference_to_lora(
    results: ModuleType, tmp_path: Path
) -> None:
    said, _, _, _, qlora, lora, full = results.finetune(plots.read(few(tmp_path / "r.csv")))
    assert TUNED in said and "Not all runs" not in said
    assert qlora == "| `qlora` | 3.4000 | 2.5100 | 0.0100 | 3 | +0.1000 ± 0.0000 | 100 | 70.0 | 2.00 | 0.25 |"
    assert lora.startswith("| `lora` | 3.3000 | 2.4100 | 0.0100 | 3 |  | 100 | 500.0 |") and "-0.1000 ± 0.0000" in full


def test_the_pages_say_plainly_when_there_is_nothing(results: ModuleType) -> None:
    assert results.convergence([]) == results.finetune([]) == ["*No run has been recorded yet.*"]


# ------------------------------------------------------------------------------------------------------------- the runs

TINY = "--device cpu --steps 4 --batch 2 --context 16 --layers 1 --width 64 --samples 1 --lr 0.01 --commit abc".split()


def test_a_run_is_saved_as_it_ends_and_not_repeated(tmp_path: Path, capsys: Any) -> None:
    out = ["--out", str(tmp_path / "r.csv"), "--only", "AdamW8bit"]
    convergence.main([*TINY, *out, "--seeds", "0"])
    convergence.main([*TINY, *out, "--seeds", "0,1"])
    assert "AdamW8bit seed 0: there already" in capsys.readouterr().out
    found = plots.read(tmp_path / "r.csv")
    losses = [r["subject"] for r in found if r["metric"] == "loss"]
    assert losses == ["AdamW8bit seed 0", "AdamW8bit seed 1"]
    assert [r["ratio"] for r in found if r["metric"] == "equal_steps"] == ["1", "1"]


def test_a_subject_that_is_not_there_is_said_and_the_rest_goes_on(capsys: Any) -> None:
    rec = convergence.main([*TINY, "--dry", "--seeds", "0", "--only", "Fastest,Lion8bit"])
    assert "Fastest seed 0: not there" in capsys.readouterr().out
    assert {r["subject"] for r in rec.rows} == {"Lion8bit seed 0"}


def test_the_usual_plan_has_the_size_of_gpt2_small() -> None:
    plan = convergence.small(convergence.options().parse_args([]))
    assert round(plan.sizes.parameters() / 1e6) == 124 and (plan.layers, plan.width) == (12, 768)
