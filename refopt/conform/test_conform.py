"""Collected by `pytest --pyargs refopt.conform`; the findings come from the plugin."""

from __future__ import annotations

from typing import Any


def test_conforms(finding: Any) -> None:
    import pytest

    if finding.status == "skip":
        pytest.skip(finding.text)
    if finding.status == "excepted":
        pytest.xfail(finding.text)
    if finding.status == "fail":
        pytest.fail(f"{finding.key}: {finding.text}", pytrace=False)
