"""The thread that steps on the host beside the caller's. Every optimizer of the process has the same one: a step takes
all cores, and OpenMP keeps a team of threads for each thread that steps; two teams make each other sleep."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

import numba


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "refopt-host")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def submit(call: Callable[..., Any], *args: Any) -> Future[None]:
    """Have the thread call this behind what it was given before, on as many threads as Numba has in the caller's."""
    return _pool().submit(_run, numba.get_num_threads(), call, args)


def _run(threads: int, call: Callable[..., Any], args: tuple[Any, ...]) -> None:
    numba.set_num_threads(threads)
    call(*args)
