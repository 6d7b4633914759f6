"""docs/conform.md is true: its files, written where a reader would write them, give the lines that it shows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refopt.__main__ import main

PAGE = Path(__file__).resolve().parents[2] / "docs/conform.md"
FENCE = re.compile(r"^```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


def shown() -> Iterator[tuple[str, str]]:
    """(kind, text) of every block of the page."""
    for found in FENCE.finditer(PAGE.read_text("utf-8")):
        yield found["kind"], found["text"]


def test_whoever_follows_the_page_sees_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "exceptions.txt").write_text("L1/base/momentum-first\n", "utf-8")
    seen, held = "", 0
    for kind, text in shown():
        if kind == "python":
            path, _, code = text.partition("\n")
            (tmp_path / path.lstrip("# ")).write_text(code, "utf-8")
        elif kind == "sh" and "my_" in text:
            words = re.findall(r'"[^"]*"|\S+', text)
            assert main([w.strip('"') for w in words[1:]]) in (0, 1)
            seen = capsys.readouterr().out
        elif kind == "text":
            for line in text.splitlines():
                assert line in seen, f"not shown: {line!r}\n{seen}"
                held += 1
    assert held > 10


def test_the_exception_of_the_page_is_excepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for kind, text in shown():
        if kind == "python":
            path, _, code = text.partition("\n")
            (tmp_path / path.lstrip("# ")).write_text(code, "utf-8")
    Path("exceptions.txt").write_text("L1/base/momentum-first\n", "utf-8")
    argv = ["conform", "my_lion_again:target", "--as", "lion", "--levels", "L1", "--exceptions", "exceptions.txt"]
    assert main(argv) == 0
    assert "excepted L1/base/momentum-first" in capsys.readouterr().out
