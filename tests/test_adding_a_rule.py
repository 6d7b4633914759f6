"""docs/adding_a_rule.md is true: its files and lines, put into a copy of the project, pass the tests they must."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/adding_a_rule.md"
FENCE = re.compile(r"^(?P<ticks>`{3,4})(?P<kind>\w[\w+]*)\n(?P<text>.*?)^(?P=ticks)$", re.MULTILINE | re.DOTALL)
TREES = ("refopt", "refopt_cuda", "tests", "docs", "pyproject.toml", "setup.cfg")


def followed(page: str, root: Path) -> list[str]:
    """Take every step of the page under `root`; returns the files that it wrote or changed, in order."""
    touched = []
    for found in FENCE.finditer(page):
        head, _, text = found["text"].partition("\n")
        path = head.strip("#/ ").strip()
        if found["kind"] == "diff":
            insert(root / path, text)
        else:
            (root / path).write_text(text, "utf-8")
        touched.append(path)
    return touched


def insert(path: Path, diff: str) -> None:
    """Put the lines that begin with + after the one that does not."""
    mark, *new = diff.splitlines()
    lines = path.read_text("utf-8").splitlines()
    assert lines.count(mark[1:]) == 1, f"{path.name} has {lines.count(mark[1:])} lines {mark[1:]!r}"
    at = lines.index(mark[1:]) + 1
    path.write_text("\n".join([*lines[:at], *(line[1:] for line in new), *lines[at:]]) + "\n", "utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__", "_build", "examples", "*.ipynb")
    for name in TREES:
        source = ROOT / name
        (shutil.copytree(source, root / name, ignore=ignored) if source.is_dir() else shutil.copy(source, root / name))
    return root


def test_whoever_follows_the_page_has_a_rule_that_passes(project: Path) -> None:
    page = PAGE.read_text("utf-8")
    table = re.findall(r"^\| \d +\| `([^`]+)` ", page, re.MULTILINE)
    assert list(dict.fromkeys(followed(page, project))) == table, "the table names other files than the page writes"
    run = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "--doctest-modules"]
    run += ["-k", "qhm or map"]
    run += ["refopt/rules/qhm.py", "tests/test_map.py", "tests/rules", "tests/step", "tests/places", "tests/memory"]
    env = os.environ | {"HYPOTHESIS_PROFILE": "quick", "PYTHONPATH": str(project)}
    done = subprocess.run(run, cwd=project, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = int(re.findall(r"(\d+) passed", done.stdout)[0])
    assert passed > 100, f"only {passed} tests saw the rule"


def test_a_line_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "table.py"
    path.write_text("one\ntwo\n", "utf-8")
    with pytest.raises(AssertionError, match="0 lines 'three'"):
        insert(path, " three\n+four\n")
