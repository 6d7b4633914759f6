"""A public name without a page fails the build: every name of an `__all__` must be documented somewhere."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from sphinx.application import Sphinx
from sphinx.util import logging

PUBLIC = (
    "refopt",
    "refopt.conform",
    "refopt_cuda",
    "refopt_cuda.optim",
    "refopt_cuda.nn",
    "refopt_cuda.convert",
)
"""Packages that users import from."""

log = logging.getLogger(__name__)


def names(package: str) -> Iterator[str]:
    """Full names of what a package exports; its modules have pages of their own."""
    module = importlib.import_module(package)
    for name in module.__all__:
        if not inspect.ismodule(getattr(module, name)):
            yield f"{package}.{name}"


def check(app: Sphinx, env: Any) -> None:
    documented = {entry[0] for entry in env.get_domain("py").get_objects()}
    for package in PUBLIC:
        for name in names(package):
            if name not in documented:
                log.warning("%s is public and has no page", name, type="refopt", subtype="public")


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}
