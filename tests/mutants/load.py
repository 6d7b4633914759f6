"""Wrong packages: a copy of `refopt` with one piece of text replaced, imported in the package's place."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import refopt

SOURCE = Path(refopt.__file__).parent


class Mutant(NamedTuple):
    """In `file` the text `old`, which occurs once, becomes `new`; `law` ("folder.test_file:test_name") must notice."""

    label: str
    file: str
    old: str
    new: str
    law: str


def is_ours(name: str) -> bool:
    return name == "refopt" or name.startswith("refopt.")


@contextmanager
def package(root: Path) -> Iterator[ModuleType]:
    """`import refopt` finds the one under `root`, until the block is left."""
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    sys.path.insert(0, str(root))
    importlib.invalidate_caches()
    try:
        yield importlib.import_module("refopt")
    finally:
        sys.path.remove(str(root))
        for name in [name for name in sys.modules if is_ours(name)]:
            del sys.modules[name]
        sys.modules |= kept


def copied(root: Path, mutant: Mutant | None = None) -> Path:
    """`root` with a copy of the package in it, mutated. A patch that does not apply is an error, never a kill."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(SOURCE, root / "refopt", ignore=shutil.ignore_patterns("__pycache__"))
    if mutant is not None:
        path = root / "refopt" / mutant.file
        text = path.read_text("utf-8")
        if text.count(mutant.old) != 1:
            raise LookupError(
                f"{mutant.label}: the text to replace occurs {text.count(mutant.old)} times in {mutant.file}"
            )
        path.write_text(text.replace(mutant.old, mutant.new), "utf-8")
    return root
