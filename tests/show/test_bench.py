"""What benchmarks count, without a GPU: bytes that must move, tensors of real models, rows, the scripts themselves."""

from __future__ import annotations

import csv
import doctest
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from refopt import Optimizer, memory
from tests.bench import clocks, cpu_optim, gpu_contract, gpu_optim, models, moved, record
from tests.bench.subjects import OURS, PEERS, Missing, Subject, named

ROOT = Path(__file__).resolve().parents[2]
PARAMETER = {"AdamW": 22, "AdamW8bit": 6 + 2 * 2.03125, "AdamWFp8": 6 + 2 * 2.03125, "Lion8bit": 6 + 2 * 1.015625}
PARAMETER |= {"AdamW4bit": 6 + 2 * 1.0625, "AdamW8bit + bf16_rem16": 10 + 2 * 2.03125}
PARAMETER |= {"SGD8bit": 6 + 2 * 1.015625, "AdEMAMix8bit": 6 + 2 * 3.046875}
"""Bytes that a step moves a bf16 parameter, by hand: p and g read, p written, states read and written."""


@pytest.mark.parametrize(
    ("work", "tensors", "millions"),
    [(models.llama1b(), 146, 1235.8), (models.lora7b(), 448, 40.0)],
    ids=lambda x: str(x),
)
def test_tensors_are_those_of_the_published_models(work: models.Work, tensors: int, millions: float) -> None:
    assert len(work.shapes) == tensors and round(work.size / 1e6, 1) == millions


def test_adapters_are_a_of_16_rows_and_b_of_16_columns() -> None:
    a, b = models.lora7b().shapes[:2]
    assert a == (16, 4096) and b == (4096, 16)


@pytest.mark.parametrize("name", PARAMETER)
def test_bytes_that_move_are_those_counted_by_hand_and_by_the_records(name: str) -> None:
    """A real optimizer over real tensors, whose states are counted; and `refopt.memory`, which allocates nothing."""
    (subject,) = named(name)
    work = models.Work("one", ((512, 1024),))
    params = models.parameters(work, "cpu")
    opt: Any = subject.make(params)
    opt.step()
    states = gpu_optim.state_bytes(opt)
    codecs = dict(opt.param_groups[0]["codecs"])
    hyper = {"momentum": 0.9} if name == "SGD8bit" else {}
    assert states == memory.states(Optimizer(opt.rule.stem, codecs, **hyper), work.shapes)
    moves = moved.must_move("element", 2 * work.size, 2 * work.size, states)
    assert moves / work.size == PARAMETER[name]


def test_bytes_of_passes_are_those_of_the_rules() -> None:
    """LAMB reads p, g, m, v twice and writes p, m, v; Adafactor reads p and g, and g again, and writes p."""
    assert moved.must_move("lamb", 2, 2, 8) == 2 * (2 + 2 + 8) + 2 + 8
    assert moved.must_move("adafactor", 2, 2, 0) == 2 + 2 + 2 + 2
    assert moved.must_move("adafactor", 2, 2, 0, moved.CLIPPED) == (2 + 2) + 2 + (2 + 2 + 2)
    assert moved.must_move("came", 2, 2, 4) == 2 + 2 + (2 + 4) + (2 + 2 + 4) + (2 + 4)
    assert doctest.testmod(moved).failed == 0


def test_reallocated_gradients_are_equal_and_elsewhere() -> None:
    params = models.parameters(models.lora7b().smaller(64), "cpu")
    old = [p.grad for p in params]
    models.reallocate(params)
    for g, p in zip(old, params, strict=True):
        assert g is not None and p.grad is not None
        assert torch.equal(g, p.grad) and g.data_ptr() != p.grad.data_ptr()


def test_what_is_not_there_is_said() -> None:
    with pytest.raises(Missing, match=r"refopt_cuda\.optim has no Fastest"):
        Subject("x", "Fastest").make([])
    with pytest.raises(Missing, match="no_such_package is not installed"):
        Subject("x", "AdamW", module="no_such_package").make([])


def test_names_of_subjects_are_distinct() -> None:
    every = [s.name for s in (*OURS, *PEERS)]
    assert len(set(every)) == len(every)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_rows_are_written_once_however_often_they_are_saved(tmp_path: Path) -> None:
    rec = record.Recorder("b", "a device", "torch 1", "abc", tmp_path / "r.csv")
    rec.add("w", "s", "ms", 1.5, "ms", "copy", 0.25)
    rec.save()
    rec.add("w", "s", "state", 2, "B/param")
    rec.save()
    rec.save()
    found = rows_of(rec.path)
    assert [(r["metric"], r["value"], r["ratio"]) for r in found] == [("ms", "1.5", "0.25"), ("state", "2", "")]
    assert tuple(found[0]) == record.COLUMNS


@pytest.mark.parametrize("missing", ["commit", "device", "software"])
def test_a_row_that_does_not_say_where_it_comes_from_is_refused(missing: str, tmp_path: Path) -> None:
    words = {"device": "a device", "software": "torch 1", "commit": "abc"} | {missing: ""}
    rec = record.Recorder("b", path=tmp_path / "r.csv", **words)
    rec.add("w", "s", "ms", 1.5, "ms")
    with pytest.raises(ValueError, match=missing):
        rec.save()
    assert not rec.path.exists()


def test_a_script_that_has_no_time_says_what_it_left_out(capsys: Any) -> None:
    limit = record.Limit(5)
    assert limit.allows("short") and not limit.allows("long", 60)
    limit.say()
    assert "long" in capsys.readouterr().out


TRY = ("--device", "cpu", "--smaller", "64", "--dry", "--quick")


def test_the_gpu_script_measures_what_is_there_and_goes_on_where_a_subject_fails(capsys: Any, monkeypatch: Any) -> None:
    """Everything but the device: on a CPU, tensors a 64th as wide."""
    whole = Subject.make

    def make(self: Subject, params: Any, **more: Any) -> Any:
        if self.name == "AdamW8bit":
            raise RuntimeError("as if the kernel were broken")
        return whole(self, params, **more)

    few = models.Work("lora7b", models.lora7b().shapes[:8], fresh=True)
    monkeypatch.setattr(models, "lora7b", lambda: few)
    monkeypatch.setattr(Subject, "make", make)
    b = gpu_optim.main([*TRY, "--parts", "lora7b", "--only", "AdamW8bit,AdamW,torch AdamW fused"])
    assert "AdamW8bit                          FAILED: RuntimeError: as if" in capsys.readouterr().out
    found = {(r["subject"], r["metric"]) for r in b.rec.rows}
    assert {("AdamW", m) for m in ("ms", "wall_ms", "of_copy", "state", "extra")} <= found
    assert ("torch AdamW fused", "ms") in found and b.value("lora7b", "AdamW", "state") == 8


def test_a_lost_device_is_taken_up_by_a_new_process_that_repeats_nothing(monkeypatch: Any) -> None:
    """After an illegal access every call of a process fails; what was tried is skipped by the next one."""
    begun: list[list[str]] = []

    def lose(device: str) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def begin(path: str, argv: list[str]) -> None:
        begun.append(argv)
        raise SystemExit

    monkeypatch.setattr(clocks, "copy_bandwidth", lambda *_: 1e12)
    monkeypatch.setattr(clocks, "synchronize", lose)
    monkeypatch.setattr(os, "execv", begin)
    with pytest.raises(SystemExit):
        gpu_optim.main([*TRY, "--parts", "galore", "--only", "AdamW"])
    (argv,) = begun
    assert argv[1:3] == ["-m", "tests.bench.gpu_optim"] and argv[argv.index("--skip") + 1] == "llama1b-block/AdamW"
    again = gpu_optim.options().parse_args(argv[3:])
    assert again.parts == ("galore",) and again.only == ("AdamW",) and again.limit < 570


def test_what_is_skipped_is_not_measured() -> None:
    b = gpu_optim.main([*TRY, "--parts", "galore", "--only", "AdamW", "--skip", "llama1b-block/AdamW"])
    assert {r["subject"] for r in b.rec.rows} == {"device copy"}


def test_nothing_measured_on_a_cpu_is_recorded() -> None:
    with pytest.raises(SystemExit, match="--dry"):
        gpu_optim.main(["--device", "cpu"])


@pytest.mark.parametrize(
    ("value", "says"), [(0.96, "goal"), (0.95, "goal"), (0.9, "kept"), (0.88, "kept"), (0.87, "MISSED")]
)
def test_verdicts_compare_with_what_was_asked(value: float, says: str) -> None:
    assert gpu_optim.verdict("llama1b", "AdamW8bit", {"of_copy": value}).startswith(says)
    assert gpu_optim.verdict("lora7b", "AdamW", {"ms": 0.45, "wall_ms": 0.7}).startswith("kept: ms")


def test_medians_are_of_the_calls_after_the_warm_ones() -> None:
    calls: list[int] = []
    clocks.wall_ms(lambda: calls.append(1), "cpu", times=4, warm=3)
    assert len(calls) == 7


def test_a_fifth_of_the_rows_of_matrices_dies() -> None:
    matrix, vector = models.parameters(models.Work("w", ((50, 16), (50,))), "cpu")
    models.deaden([matrix, vector])
    assert matrix.grad is not None and vector.grad is not None
    alive = matrix.grad.abs().sum(1) > 0
    assert alive.sum() == 40 and not alive[::5].any() and vector.grad.all()


def test_dead_rows_are_timed_beside_live_ones() -> None:
    b = gpu_optim.main([*TRY, "--parts", "dead", "--only", "AdamW8bit"])
    found = [r for r in b.rec.rows if r["metric"] == "dead_rows"]
    assert [r["subject"] for r in found] == ["AdamW8bit beta2 0.999", "AdamW8bit beta2 0.95"]
    assert all(r["baseline"].startswith("dense") and float(r["ratio"]) > 0 for r in found)


def test_cpu_subjects_take_turns_in_both_orders() -> None:
    """The peer is torch's; what is faster is the peer's time over ours, of the same run."""
    rec = cpu_optim.main(["--dry", "--quick", "--only", "AdamW", "--elements", "4096"])
    found = {(r["subject"], r["metric"]): r for r in rec.rows if "torch AdamW fused" in r["baseline"] + r["subject"]}
    ours, peer = found["AdamW", "faster"], found["torch AdamW fused", "ms"]
    assert float(ours["ratio"]) == pytest.approx(float(peer["value"]) / float(ours["value"]), rel=1e-3)


def test_the_script_of_the_contract_sets_every_way_beside_the_plain_step() -> None:
    words = "--dry --quick --device cpu --smaller 64 --parts llama1b-block --only clipped,scaled".split()
    rows = gpu_contract.main(words).rows
    assert {r["subject"] for r in rows} == {"AdamW8bit plain", "AdamW8bit clipped", "AdamW8bit scaled"}
    assert all(float(r["ratio"]) > 0 and r["baseline"] == "AdamW8bit plain" for r in rows)


def test_the_twins_script_runs_in_the_simulator() -> None:
    """In a process of its own: Numba decides once whether it simulates."""
    command = [sys.executable, "-m", "tests.bench.gpu_twin", *"--elements 512 --dry --quick --only AdamW".split()]
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Numba-CUDA twin AdamW" in done.stdout and "FAILED" not in done.stdout, done.stderr
