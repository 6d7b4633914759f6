"""A job that takes two seconds, in a folder of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs torch: pip install 'refopt[train]'")
pytest.importorskip("typer", reason="needs typer: pip install 'refopt[train]'")

SMALL = "--steps 12 --batch 2 --width 64 --layers 1 --heads 2 --hidden 64 --context 16 --samples 6 --device cpu"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder with a text in it: 40 kB of sentences."""
    monkeypatch.chdir(tmp_path)
    words = ["the", "moment", "of", "a", "gradient", "is", "kept", "in", "eight", "bits", "and", "read", "back"]
    text = " ".join(words[(k * k + k // 7) % len(words)] for k in range(8000))
    (tmp_path / "text.txt").write_text(text, "utf-8")
    return tmp_path


@pytest.fixture
def refopt_train(here: Path) -> Callable[[str], int]:
    """`refopt train` with a small model on the small text; returns the exit code."""
    from refopt.__main__ import main

    return lambda words: main(["train", *words.split()])
