"""Ranks that keep their shards in files: a directory for each, and the step that all of them go on with.

Every rank stamps its own steps, so that ranks of a job that was killed may have stamped different ones. They go on with
the newest step that all have. A rank that is ahead goes back to its older stamp, if no page of that was written over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from refopt.spec import StateError
from refopt_cuda.optim import sharded
from refopt_cuda.places import vault

Stamps = Sequence[Mapping[int, int]]
"""The steps of each parameter that the stamps of a directory name, the newest first."""


def folder_of(path: Path, params: Iterable[torch.Tensor]) -> Path:
    """Where this rank keeps its shards; `path` itself where no parameter is sharded."""
    if not any(map(sharded.is_sharded, params)):
        return path
    return path / f"rank{dist.get_rank()}of{dist.get_world_size()}"


def steps_of(stamp: Mapping[str, Any]) -> dict[int, int]:
    """The steps of each parameter by number."""
    return {int(number): step for number, step in stamp["steps"].items()}


def resumed(
    folder: Path, owned: set[int], again: Callable[[dict[str, Any] | None], Any], call: str
) -> tuple[Any, Any, Any, dict[int, int]]:
    """What `again` makes of the stamp that all ranks go on with, and the steps of each parameter.

    owned    parameters whose states this rank has files of; it needs no directory if there are none
    Every rank must call it. What one of them raises stops all: FileNotFoundError where a rank has no complete step,
    StateError where no step is complete on all, RuntimeError where another rank cannot go on.
    """
    error: BaseException | None = None
    stamps: list[dict[str, Any]] = []
    try:
        stamps = vault.stamps(folder)
    except OSError as raised:
        error = raised
    _together(error, None, call)
    steps = common(_gathered((owned, [*map(steps_of, stamps)])), folder.parent, call)
    found: Any = None, {}, {}
    if owned:
        stamp = next(s for s in stamps if _same(steps_of(s), steps, owned))
        try:
            found = again(stamp)
        except Exception as raised:
            error = raised
    _together(error, found[0], call)
    if owned and stamp is not stamps[0]:
        found[0].go_back()
    return *found, steps


def common(ranks: Sequence[tuple[set[int], Stamps]], path: Path, call: str) -> dict[int, int]:
    """The newest steps that every rank has a stamp of; each is asked for the parameters that it has files of."""
    empty = [k for k, (owned, stamps) in enumerate(ranks) if owned and not stamps]
    if empty:
        raise FileNotFoundError(f"{call}: path={str(path)!r} holds no complete step of rank {empty[0]} of {len(ranks)}")
    every = [steps for owned, stamps in ranks if owned for steps in stamps]
    for steps in sorted(every, key=lambda steps: -sum(steps.values())):
        if all(not owned or any(_same(s, steps, owned) for s in stamps) for owned, stamps in ranks):
            return dict(steps)
    newest = [max(stamps[0].values(), default=0) if owned else None for owned, stamps in ranks]
    raise StateError(
        f"{call}: path={str(path)!r} holds no step that is complete on all ranks, their newest are {newest}; load a "
        "checkpoint"
    )


def _same(a: Mapping[int, int], b: Mapping[int, int], numbers: Iterable[int]) -> bool:
    return all(a.get(k) == b.get(k) for k in numbers)


def _gathered(x: Any) -> list[Any]:
    """What every rank gave."""
    out: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(out, x)
    return out


def _together(error: BaseException | None, opened: Any, call: str) -> None:
    """Raise where a rank could not go on, its own error there; what the others have opened is closed."""
    said = _gathered(error and f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if any(said):
        if opened is not None:
            opened.close(keep=True)
        k = next(k for k, text in enumerate(said) if text)
        raise RuntimeError(f"{call}: rank {k} cannot go on, so none does: {said[k]}")
