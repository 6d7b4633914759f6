"""docs/field.md holds every reproduction, and those that torch alone can run print what it shows."""

from __future__ import annotations

import pytest

from tests.conform import field_gpu
from tests.conform.field import DEVIATIONS, PAGE, Deviation, gpu, ran
from tests.conform.gpu_deviations import DEVIATIONS as ON_GPU
from tests.conform.peers import Peer


@pytest.mark.parametrize("d", DEVIATIONS, ids=lambda d: d.title)
def test_a_reproduction_stands_on_the_page_and_is_short(d: Deviation) -> None:
    assert f"## {d.title}" in (text := PAGE.read_text("utf-8"))
    assert f"```python\n{d.code}```" in text
    assert len(d.code.splitlines()) <= 14


@pytest.mark.parametrize("d", [d for d in DEVIATIONS if d.package == "torch"], ids=lambda d: d.title)
def test_what_it_prints_is_what_the_page_shows(d: Deviation) -> None:
    pytest.importorskip("torch")
    assert f"```python\n{d.code}```\n\n```text\n{ran(d.code)}\n```" in PAGE.read_text("utf-8")


def test_reproductions_for_a_gpu_are_short_and_can_be_read() -> None:
    assert len({d.title for d in ON_GPU}) == len(ON_GPU)
    for d in ON_GPU:
        compile(d.code, d.title, "exec")
        assert len(d.code.splitlines()) <= 14
        assert not d.holds(""), "nothing printed shows nothing"


def test_what_a_gpu_found_is_on_the_page_and_what_did_not_hold_is_not() -> None:
    held, not_held = ON_GPU[0], ON_GPU[1]
    finding = {"level": "L1", "setting": "base", "status": "fail", "id": "decay-order-after", "text": "", "data": {}}
    finding["data"] = {"mode": "forced", "worst_ulps": {"p": "inf"}}
    found = {"commit": "abc", "device": "a GPU", "cuda": "13.0", "python": "3.12", "torch": "2.11"}
    found["rows"] = [  # type: ignore[assignment]
        {"target": "x:Y", "claim": "adamw", "findings": [finding]},
        {"target": "x:Z", "claim": "adamw", "error": "CUDA error: an illegal memory access was encountered"},
    ]
    found["reproductions"] = [  # type: ignore[assignment]
        {"title": held.title, "code": held.code, "printed": "0.8", "error": "", "holds": True},
        {"title": not_held.title, "code": not_held.code, "printed": "", "error": "", "holds": False},
    ]
    text = "\n".join(gpu(found))
    assert "| `x:Y` | `adamw` | forced, inf | - | decay-order-after |" in text
    assert "did not finish: CUDA error" in text
    assert f"### {held.title}" in text and f"```python\n{held.code}```" in text
    assert f"### {not_held.title}" not in text
    assert f"not seen with these versions: {not_held.title}" in text


def test_the_page_has_what_was_measured() -> None:
    measured = field_gpu.held()
    if measured is None:
        pytest.skip("docs/bench/field_gpu.json has not been measured")
    assert "\n".join(gpu(measured)) in PAGE.read_text("utf-8")


def test_a_process_that_falls_says_so_and_takes_nothing_along() -> None:
    assert field_gpu.ran("import os; os._exit(3)").error == "exit code 3"
    assert field_gpu.ran("print(1); raise ValueError('x')") == ("1", "ValueError: x")
    row = field_gpu.scored(Peer("refopt.conform.broken:right", "adamw"))
    assert row["error"].startswith("ValueError: refopt.conform.broken:right takes no options, got device")
