"""docs/field.md holds every reproduction, and those that torch alone can run print what it shows."""

from __future__ import annotations

import pytest

from tests.conform.field import DEVIATIONS, PAGE, Deviation, ran


@pytest.mark.parametrize("d", DEVIATIONS, ids=lambda d: d.title)
def test_a_reproduction_stands_on_the_page_and_is_short(d: Deviation) -> None:
    assert f"## {d.title}" in (text := PAGE.read_text("utf-8"))
    assert f"```python\n{d.code}```" in text
    assert len(d.code.splitlines()) <= 14


@pytest.mark.parametrize("d", [d for d in DEVIATIONS if d.package == "torch"], ids=lambda d: d.title)
def test_what_it_prints_is_what_the_page_shows(d: Deviation) -> None:
    pytest.importorskip("torch")
    assert f"```python\n{d.code}```\n\n```text\n{ran(d.code)}\n```" in PAGE.read_text("utf-8")
