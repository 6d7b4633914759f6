"""The command for GPUs: what it takes for clean, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import gpu

CLEAN = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"
DIRTY = "========= ERROR SUMMARY: 2 errors\n"


@pytest.mark.parametrize(
    ("name", "code", "log", "good"),
    [
        ("racecheck", 0, "equal\n" + CLEAN, True),
        ("memcheck", 0, DIRTY.replace("2", "0") * 2, True),
        ("memcheck", 0, DIRTY.replace("2", "0") + DIRTY, False),
        ("memcheck", 0, "equal\n", False),
        ("memcheck", 1, DIRTY.replace("2", "0"), False),
        ("tests", 0, "3 passed", True),
        ("tests", 1, "1 failed", False),
    ],
)
def test_clean_is_what_every_process_says(name: str, code: int, log: str, good: bool, tmp_path: Path) -> None:
    (tmp_path / f"{name}.log").write_text(log)
    found = gpu.verdict(name, code, tmp_path)
    assert (found == "ok") == good and (good or found.endswith(log.splitlines()[-1]))


def test_an_unknown_tool_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--tools", "memcheck,raceczech"])
    assert "no such tool: raceczech; there are memcheck" in capsys.readouterr().err
