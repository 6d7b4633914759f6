"""Compiled host kernels on disk, so that the next process starts at once."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.bytecode import FunctionIdentity
from numba.core.caching import FunctionCache, IndexDataCacheFile

__all__ = ["cached"]


def _number_apart() -> None:
    """Have Numba number the functions that it compiles from a random start.

    A symbol is named after its function and that number. A kernel from disk brings the symbols of its scalar forms
    along; were the numbers of two processes alike, a form compiled here would be linked to another one's code.
    """
    FunctionIdentity._unique_ids = itertools.count(int.from_bytes(os.urandom(7), "little"))


if NUMBERED := isinstance(getattr(FunctionIdentity, "_unique_ids", None), itertools.count):
    _number_apart()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_number_apart)


class _Cache(FunctionCache):
    """Numba's disk cache with a key of our own.

    Numba keys a closure by what it closes over, and jitted functions there are new objects in every process, so that
    nothing is ever found again. Here the file is named after the combination and stamped with the sources of all
    scalar forms. Each signature and processor has files of its own: Numba numbers the signatures of one index, and
    two processes that number at the same time would swap their code.
    """

    def __init__(self, function: Callable, name: str) -> None:
        super().__init__(function)
        self._name = name

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        self._choose(sig, target_context.codegen())
        return super().load_overload(sig, target_context)

    def save_overload(self, sig: Any, data: Any) -> None:
        self._choose(sig, data.codegen)
        super().save_overload(sig, data)

    def _choose(self, sig: Any, codegen: Any) -> None:
        key = hashlib.sha256(repr(self._index_key(sig, codegen)).encode()).hexdigest()[:16]
        self._cache_file = IndexDataCacheFile(self._cache_path, f"step_host.{self._name}.{key}", _sources())

    def _index_key(self, sig: Any, codegen: Any) -> tuple:
        return sig, codegen.magic_tuple()


@cache
def _sources() -> str:
    """One hash over everything that a kernel is made of."""
    root = Path(__file__).parent.parent
    files = sorted(f for folder in ("rules", "codecs", "kernels") for f in (root / folder).glob("*.py"))
    return hashlib.sha256(b"\0".join(f.read_bytes() for f in files)).hexdigest()


def cached(kernel: Any, name: str) -> Any:
    """The jitted `kernel`, looked up and stored under `name`; compiled in every process where that is not safe."""
    if not NUMBERED:
        return kernel
    try:
        kernel._cache = _Cache(kernel.py_func, name)
    except (RuntimeError, OSError):
        pass  # no directory to write to: compiled in every process
    return kernel
