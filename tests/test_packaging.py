"""What a user can rely on after `pip install refopt`, and that every setting agrees with the code."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import refopt

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
HEAVY = ["cupy", "cuda", "matplotlib", "numba", "numba_cuda", "rich", "scipy", "torch", "typer"]
FILES = [m.name for m in pkgutil.walk_packages(refopt.__path__, "refopt.") if not m.ispkg]
WITH_NUMBERS = [m for m in FILES if ">>> " in ROOT.joinpath(*m.split(".")).with_suffix(".py").read_text("utf-8")]


def normal(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def with_numpy_alone(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in an interpreter in which everything but NumPy refuses to be imported."""
    block = f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r})); "
    return subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("package", ["refopt", "refopt_cuda"])
def test_both_packages_import_with_numpy_alone(package: str) -> None:
    done = with_numpy_alone(f"import {package}")
    assert done.returncode == 0, done.stderr


def test_the_command_line_traces_with_numpy_alone() -> None:
    done = with_numpy_alone("import sys; from refopt.__main__ import main; sys.exit(main(['trace', 'adamw']))")
    assert done.returncode == 0, done.stderr
    assert 'v = beta2 * state["v"] + omb2 * (g * g)' in done.stdout


def test_numpy_is_the_only_base_dependency() -> None:
    assert [re.split(r"\W", d)[0] for d in PROJECT["dependencies"]] == ["numpy"]


def test_the_version_is_one() -> None:
    assert refopt.__version__ == PROJECT["version"]
    assert f"## {refopt.__version__}" in (ROOT / "CHANGELOG.md").read_text("utf-8")


def test_every_requirement_of_make_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = {normal(line.split("==")[0]) for line in lines if "==" in line}
    extras = PROJECT["optional-dependencies"]
    used = ("train", "convert", "peers", "frontends", "test", "docs", "dev")
    wanted = [d for extra in used for d in extras[extra]] + PROJECT["dependencies"]
    missing = {normal(re.split(r"[<>=!; \[]", d)[0]) for d in wanted} - pins
    assert not missing, f"no pin in constraints.txt: {sorted(missing)}"


@pytest.mark.parametrize("name", WITH_NUMBERS)
def test_the_numbers_in_docstrings_are_right(name: str) -> None:
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted > 0
    assert failed == 0


@pytest.mark.parametrize("stem", refopt.rules.RULES)
def test_every_rule_shows_numbers_that_are_checked(stem: str) -> None:
    assert f"refopt.rules.{stem}" in WITH_NUMBERS


@pytest.mark.parametrize("number", range(3))
def test_the_code_in_the_readme_runs(number: int) -> None:
    block = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)[
        number
    ]
    if "torch" in block:
        pytest.importorskip("torch")
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (ROOT / "README.md").read_text("utf-8"))
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links
    assert not missing, f"README.md links to {missing}"
