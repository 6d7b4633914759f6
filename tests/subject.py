"""The subject of the laws. A law takes it as its argument `ref`, so that a mutated package can stand in its place."""

from __future__ import annotations

from types import ModuleType

import pytest

import refopt


@pytest.fixture(scope="session")
def ref() -> ModuleType:
    """The package under test."""
    return refopt
