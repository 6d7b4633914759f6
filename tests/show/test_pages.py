"""What pages say is so: code runs, errors exist, figures are the records', links lead somewhere."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest

import refopt

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
ANY = "…"


def text(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), re.MULTILINE | re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*(cannot move|place)")
def test_the_code_of_the_how_to_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    known: dict[str, Any] = {}
    for block in blocks("docs/howto.md", "python"):
        exec(block, known)
    printed = capsys.readouterr().out
    assert "total" in printed and "pass " in printed


def sentences() -> list[str]:
    """Every string of the sources, what is put into it written as `ANY`."""
    out = []
    for package in ("refopt", "refopt_cuda"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else ANY for part in node.values]
                    out.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    out.append(node.value)
    return out


def test_every_error_on_the_page_of_errors_is_one_that_the_sources_raise() -> None:
    known = sentences()
    quoted = [line for block in blocks("docs/errors.md", "text") for line in block.splitlines()]
    assert len(quoted) > 20
    for line in quoted:
        wanted = re.compile(".*?".join(re.escape(part) for part in line.split(ANY)), re.DOTALL)
        assert any(wanted.search(said) for said in known), f"docs/errors.md: nothing says {line!r}"


def test_the_table_of_the_readme_is_that_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DOCS / "_ext")
    figures = importlib.import_module("figures")
    cells = [tuple(c.strip() for c in line.strip("| ").split("|")) for line in text("README.md").splitlines()]
    for line in figures.measured(figures.rows()):
        assert line in cells, f"README.md lacks {line}: python docs/_ext/figures.py prints the table"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_of_pages_outside_of_the_documentation_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", text(page)):
        if not target.startswith(("http", "mailto:")):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}, which is not there"


def test_a_rule_that_is_printed_names_all_that_it_keeps_and_takes() -> None:
    for rule in refopt.rules.RULES.values():
        said = str(rule)
        assert said.startswith(f"{rule.title}: {rule.source}")
        assert all(f"  {s.name} " in said for s in rule.states)
        assert all(f"  {h.name}={h.default!r}" in said for h in rule.hypers)
    assert str(refopt.rules.ademamix).count(": 4 bytes a weight") == 3
    assert "largest v so far, never negative: none of a matrix by default" in str(refopt.rules.adamw)
    assert "R        row factor, never negative: float32 (1024,)" in str(refopt.rules.adafactor)
