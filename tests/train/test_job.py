"""The command: results, a stop that loses nothing, and bad input that is refused before any work."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from refopt_cuda.train import cli, job, plan, report
from tests.train.conftest import SMALL

Train = Callable[[str], int]


def test_a_small_job_ends_with_table_report_and_metrics(
    refopt_train: Train, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refopt_train(f"{SMALL} --text text.txt --name a") == 0
    out = capsys.readouterr().out
    assert "equal to the NumPy reference: 6 of 6 sampled steps, bit for bit" in out
    assert "trigram" in out and "refopt trace" in out
    page = (here / "runs/a/report.html").read_text("utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page loads something from elsewhere"
    (svg,) = re.findall(r"data:image/svg\+xml;base64,([^\"]+)", page)
    assert b"<svg" in base64.b64decode(svg)
    for name in ("torch.AdamW", "AdamW8bit", "Lion8bit", "AdamW:v=int8_linear"):
        assert name in out and name in page
    rows = (here / "runs/a/metrics.csv").read_text("utf-8").splitlines()
    assert len(rows) == 1 + 5 * 13
    assert len(list((here / "runs/a").glob("seed0/*/checkpoint.pt"))) == 5
    assert (here / "runs/a/loss_and_bytes.png").stat().st_size > 10_000


def test_a_stopped_job_goes_on_to_the_same_bits(
    refopt_train: Train, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{SMALL} --text text.txt --optimizers AdamW8bit Lion8bit torch.AdamW"
    assert refopt_train(f"{words} --name whole") == 0
    words += " --place disk"
    calls = iter(range(1000))
    monkeypatch.setattr(job.Stop, "__call__", lambda self: next(calls) in (6, 22))
    assert refopt_train(f"{words} --name parts") == cli.INTERRUPTED
    assert "--resume --name parts" in " ".join(capsys.readouterr().out.split())
    assert refopt_train("--resume --name parts") == cli.INTERRUPTED
    assert refopt_train("--resume") == 0
    whole, parts = ((here / "runs" / n / "metrics.csv").read_bytes() for n in ("whole", "parts"))
    assert whole == parts


PLACES = ("resident", "paged", "host", "disk")


def test_a_place_changes_no_bit_of_the_results(refopt_train: Train, here: Path) -> None:
    words = f"{SMALL} --text text.txt --optimizers AdamW8bit"
    for place in PLACES:
        assert refopt_train(f"{words} --name {place} --place {place}") == 0
    tables = [(here / "runs" / place / "metrics.csv").read_bytes() for place in PLACES]
    assert len(set(tables)) == 1
    assert not [*here.glob("runs/*/*/*/states")], "files of states go with the run"


def test_seeds_are_compared_in_pairs(refopt_train: Train, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refopt_train(f"{SMALL} --text text.txt --optimizers AdamW AdamW8bit --seeds 2 --name s") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"AdamW8bit − AdamW: [+-]0\.\d{4} ± \d\.\d{4} bits \(.*, .*\): (within|beyond) noise", out)


def test_students_t_has_the_published_quantiles() -> None:
    for degrees, want in ((1, 12.706), (2, 4.303), (5, 2.571), (30, 2.042)):
        assert report.student(degrees) == pytest.approx(want, rel=1e-3)


BAD = {
    "missing file": ("--text nothing.txt", "nothing.txt: no such file"),
    "empty file": ("--text empty.txt", "empty.txt: is empty"),
    "short file": ("--text short.txt", "too short"),
    "not text": ("--text binary.bin", "not UTF-8"),
    "a folder": ("--text .", "is a folder"),
    "unknown optimizer": ("--optimizers AdmW8bit", "did you mean AdamW8bit"),
    "heads": ("--width 64 --heads 5", "multiple of heads"),
    "steps": ("--steps 0", "--steps must be at least 1"),
    "seeds": ("--seeds 0", "--seeds must be at least 1"),
    "rate": ("--lr nan", "--lr must be a positive number"),
    "place": ("--place moon", "--place must be one of resident, paged, host, auto, disk"),
    "device": ("--device tpu", "--device must be cpu or cuda"),
    "memory": ("--width 65536 --heads 64 --hidden 200000 --layers 100", "not enough memory"),
    "name": ("--name ../x", "--name must be the name of a folder"),
    "nothing to resume": ("--resume", "holds no run"),
    "no option": ("--stepz 3", "No such option"),
    "not a number": ("--steps many", "Invalid value for '--steps'"),
}


@pytest.mark.parametrize(("words", "says"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(
    refopt_train: Train, here: Path, capsys: pytest.CaptureFixture[str], words: str, says: str
) -> None:
    (here / "empty.txt").write_bytes(b"")
    (here / "short.txt").write_text("too short")
    (here / "binary.bin").write_bytes(b"\xff\xfe\x00")
    assert refopt_train(words if "--device" in words or "--resume" in words else f"{words} --device cpu") == 2
    err = " ".join(capsys.readouterr().err.split())
    assert says in err
    assert not (here / "runs").exists(), "nothing was begun"


def test_a_folder_that_cannot_be_written_is_refused(
    refopt_train: Train, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "runs").write_text("a file")
    assert refopt_train("--device cpu --text text.txt") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_name_is_not_used_twice_and_another_text_is_not_resumed(
    refopt_train: Train, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"{SMALL} --text text.txt --optimizers AdamW8bit --name a"
    monkeypatch.setattr(job.Stop, "__call__", lambda self: True)
    assert refopt_train(words) == cli.INTERRUPTED
    assert refopt_train(words) == 2
    assert "--resume --name a" in capsys.readouterr().err
    assert refopt_train("--resume --name a --steps 5") == 2
    assert "leave out --steps" in capsys.readouterr().err
    (here / "text.txt").write_text("another text " * 1000)
    assert refopt_train("--resume --name a") == 2
    assert "sha256" in capsys.readouterr().err


def test_many_values_of_one_option() -> None:
    words = "--text a b --steps 3 --optimizers X Y --text c".split()
    assert cli.many(words) == "--text a --text b --steps 3 --optimizers X --optimizers Y --text c".split()


def test_the_learning_rate_warms_up_and_falls() -> None:
    p = plan.usual("cpu")
    rates = np.array([p.rate(t) for t in range(1, p.steps + 1)])
    assert rates.argmax() == p.steps // 20 - 1 and rates.max() == 1
    assert (np.diff(rates)[p.steps // 20 :] < 0).all() and rates[-1] == pytest.approx(0.05)
