"""The thread that steps on the host beside the caller's. Every optimizer of the process has the same one: a step takes
all cores, and OpenMP keeps a team of threads for each thread that steps; two teams make each other sleep."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any, TypeVar

import numba

T = TypeVar("T")
_team = [0]
"""How many of Numba's threads step; 0: all."""


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "refopt-host")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def heed() -> None:
    """From now on the thread steps on as many threads as Numba has in the caller's, which autograd's own thread, which
    gives it pages in backward, knows nothing of."""
    _team[0] = numba.get_num_threads()


def submit(call: Callable[..., T], *args: Any) -> Future[T]:
    """Have the thread call this behind what it was given before."""
    return _pool().submit(_run, call, args)


def _run(call: Callable[..., T], args: tuple[Any, ...]) -> T:
    numba.set_num_threads(_team[0] or numba.get_num_threads())
    return call(*args)
