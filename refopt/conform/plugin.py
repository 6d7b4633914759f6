"""The pytest side: `pytest --pyargs refopt.conform --target torch.optim:AdamW --as adamw`.

One test a finding: what fails fails with its diagnosis, what is excepted is an expected failure, and what could not be
asked is skipped with the reason.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    from refopt.conform.cli import arguments

    group = parser.getgroup("refopt", "conformance of an optimizer (--pyargs refopt.conform)")
    group.addoption("--target", metavar="MODULE:NAME", help="the optimizer under test")
    group.addoption("--scorecard", metavar="FILE", help="write every finding as a page, or as JSON for a name in .json")
    arguments(group)


def findings(config: pytest.Config) -> list[Any]:
    """Every finding, computed once a session; raises a usage error for options that cannot be used."""
    import pytest

    from refopt.conform.cli import asked
    from refopt.conform.report import page

    held = getattr(config, "_refopt_findings", None)
    if held is not None:
        return held
    target, claim = config.getoption("--target"), config.getoption("claim")
    if not target or not claim:
        raise pytest.UsageError("refopt.conform needs --target module:Name and --as RULE")
    try:
        report = asked(target, claim, config.option)
        if path := config.getoption("--scorecard"):
            text = report.json() if path.endswith(".json") else page([report], f"{target} as {claim}")
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
    except (ValueError, TypeError, OSError) as error:
        raise pytest.UsageError(f"refopt.conform: {error}") from error
    for text in report.warnings:
        warnings.warn(pytest.PytestWarning(text), stacklevel=1)
    config._refopt_findings = report.findings  # type: ignore[attr-defined]
    return report.findings


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__module__ == "refopt.conform.test_conform":
        every = findings(metafunc.config)
        metafunc.parametrize("finding", every, ids=[f.key for f in every])
