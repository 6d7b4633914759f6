"""`refopt conform`, and the same through pytest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from refopt.__main__ import main
from refopt.conform import run
from refopt.conform.report import LEVELS, excepted, page, patterns

ROOT = Path(__file__).resolve().parents[2]
BROKEN = "refopt.conform.broken:"


def test_what_conforms_exits_with_0_and_what_does_not_with_1(capsys: Any) -> None:
    assert main(["conform", BROKEN + "right", "--as", "adamw"]) == 0
    assert main(["conform", BROKEN + "lion_is_signum", "--as", "lion"]) == 1
    assert "L1/base/signum-beta1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([BROKEN + "right"], "--as"),
        (["nowhere", "--as", "adamw"], "module:Name"),
        (["no.such.module:X", "--as", "adamw"], "cannot import"),
        ([BROKEN + "nobody", "--as", "adamw"], "nobody"),
        ([BROKEN + "right", "--as", "adamv"], "adamw"),
        ([BROKEN + "right", "--as", "adamw", "--levels", "L9"], "L9"),
        ([BROKEN + "right", "--as", "adamw", "--option", "x"], "name=value"),
        ([BROKEN + "right", "--as", "adamw", "--exceptions", "/no/such/file"], "No such file"),
    ],
)
def test_input_that_cannot_be_used_exits_with_2_and_a_sentence(argv: list[str], says: str, capsys: Any) -> None:
    assert main(["conform", *argv]) == 2
    assert says in capsys.readouterr().err


def test_findings_are_written_as_json_and_as_a_page(tmp_path: Path) -> None:
    out, html = tmp_path / "out.json", tmp_path / "out.html"
    main(["conform", BROKEN + "adamw_decays_after", "--as", "adamw", "--json", str(out), "--html", str(html)])
    data = json.loads(out.read_text("utf-8"))
    assert "L1/base/decay-order-after" in {f"{f['level']}/{f['setting']}/{f['id']}" for f in data["findings"]}
    text = html.read_text("utf-8")
    assert "decay-order-after" in text
    assert all(f">{level}<" in text for level in LEVELS)


def test_a_page_shows_text_as_text() -> None:
    report = run(BROKEN + "right", "adamw", only=["L0"])
    report.target = "<script>"
    assert "<script>" not in page([report])


def test_an_exception_excepts_and_one_that_names_nothing_warns(tmp_path: Path) -> None:
    file = tmp_path / "exceptions.txt"
    file.write_text("L1/*/decay-decoupled  # on purpose\n\n# nothing else\nL6/base/special-nan\n", "utf-8")
    report = excepted(run(BROKEN + "adam_decouples_its_decay", "adam"), patterns(file))
    assert report.ok
    assert [f.key for f in report.findings if f.status == "excepted"] == ["L1/base/decay-decoupled"]
    assert len(report.warnings) == 1
    assert "L6/base/special-nan" in report.warnings[0]


def by_pytest(tmp_path: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """`pytest --pyargs refopt.conform ...` away from the project; -p stands in for an installed entry point."""
    command = [sys.executable, "-m", "pytest", "-p", "refopt.conform.plugin", "-p", "no:cacheprovider", "-rA", "-q"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": ""}
    command += ["--pyargs", "refopt.conform", "--rootdir", str(tmp_path), *argv]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_pytest_has_a_test_for_each_finding(tmp_path: Path) -> None:
    file = tmp_path / "exceptions.txt"
    file.write_text("L6/base/no-such-thing\n", "utf-8")
    card = tmp_path / "card.json"
    argv = ["--target", BROKEN + "adamw_swaps_its_betas", "--as", "adamw"]
    done = by_pytest(tmp_path, *argv, "--exceptions", str(file), "--scorecard", str(card))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED" in done.stdout
    assert "test_conforms[L1/base/betas-swapped]" in done.stdout
    assert "beta1 and beta2 are swapped" in done.stdout
    assert "no failure is called L6/base/no-such-thing" in done.stdout
    assert json.loads(card.read_text("utf-8"))["claim"] == "adamw"
    done = by_pytest(tmp_path, "--target", BROKEN + "right", "--as", "adamw")
    assert done.returncode == 0, done.stdout + done.stderr


def test_pytest_without_a_target_says_what_it_needs(tmp_path: Path) -> None:
    done = by_pytest(tmp_path)
    assert done.returncode != 0
    assert "--target" in done.stdout + done.stderr


def test_the_plugin_is_an_entry_point_under_the_name_of_its_module() -> None:
    """Then `-p` and the entry point name one plugin, which is not registered twice."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"refopt.conform.plugin": "refopt.conform.plugin"}
