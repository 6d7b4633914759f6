"""The places that an optimizer's states may live in, and what each takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from refopt_cuda.optim.delayed import Delayed
from refopt_cuda.optim.filing import OnDisk
from refopt_cuda.optim.hosting import Hosted
from refopt_cuda.optim.paging import Paged
from refopt_cuda.optim.splitting import Mixed
from refopt_cuda.optim.states import Layout


class Placed(NamedTuple):
    """A place and its options."""

    place: str
    page_bytes: int | None = None
    resident_bytes: int | str = 0
    during_backward: bool = False
    delay: int = 0
    warm: int = 0
    path: str | None = None
    keep_weights: bool = False


HOMES: dict[str, Any] = {"paged": Paged, "host": Hosted, "auto": Mixed, "disk": OnDisk}
KNOWN = ("resident", *HOMES)


def check(
    place: Any,
    page_bytes: Any,
    resident_bytes: Any,
    during_backward: Any,
    call: str,
    *,
    delay: Any = None,
    warm: Any = None,
    path: Any = None,
    keep_weights: Any = False,
) -> Placed:
    """What was asked for; ValueError names the argument."""
    if delay is not None or warm is not None:
        _check_delay(place, page_bytes, resident_bytes, during_backward, delay, warm, call)
    if not isinstance(during_backward, bool):
        raise ValueError(f"{call}: during_backward must be True or False, got {during_backward!r}")
    if during_backward and place in ("resident", "disk"):
        raise ValueError(f"{call}: during_backward is of place='paged', 'host' or 'auto', and place is {place!r}")
    if place not in KNOWN:
        raise ValueError(f"{call}: place must be one of {', '.join(map(repr, KNOWN))}, got {place!r}")
    _check_path(place, path, keep_weights, call)
    given = {"page_bytes": page_bytes, "resident_bytes": resident_bytes}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if place == "resident" or (place == "disk" and name == "resident_bytes"):
            raise ValueError(f"{call}: {name} is of place='paged', 'host' or 'auto', and place is {place!r}")
        low, auto = (1, False) if name == "page_bytes" else (0, True)
        if not (auto and value == "auto") and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            words = ' or "auto"' if auto else ""
            raise ValueError(f"{call}: {name} must be a whole number >= {low}{words}, got {value!r}")
    if place == "auto":
        given = {"resident_bytes": "auto", **given}
    given |= {"path": None if path is None else os.fspath(path), "keep_weights": keep_weights}
    return Placed(place, **given, during_backward=during_backward, delay=delay or 0, warm=warm or 0)


def _check_delay(
    place: Any, page_bytes: Any, resident_bytes: Any, during_backward: Any, delay: Any, warm: Any, call: str
) -> None:
    if isinstance(delay, bool) or delay not in (None, 0, 1):
        raise ValueError(f"{call}: delay must be 0 or 1, got {delay!r}")
    if warm is not None and (isinstance(warm, bool) or not isinstance(warm, int) or warm < 0):
        raise ValueError(f"{call}: warm must be a whole number >= 0, got {warm!r}")
    if warm and not delay:
        raise ValueError(f"{call}: warm is of delay=1, and delay is {delay or 0}")
    if delay and place != "host":
        raise ValueError(f"{call}: delay=1 is of place='host', and place is {place!r}")
    if delay and during_backward:
        raise ValueError(f"{call}: with delay=1 the host steps during the next backward pass: no during_backward")
    for name, value in (("page_bytes", page_bytes), ("resident_bytes", resident_bytes)):
        if delay and value not in (None, 0):
            raise ValueError(f"{call}: with delay=1 whole tensors go to the host: no {name}, got {value!r}")


def _check_path(place: str, path: Any, keep_weights: Any, call: str) -> None:
    if not isinstance(keep_weights, bool):
        raise ValueError(f"{call}: keep_weights must be True or False, got {keep_weights!r}")
    if keep_weights and place != "disk":
        raise ValueError(f"{call}: keep_weights is of place='disk', and place is {place!r}")
    if place != "disk" and path is not None:
        raise ValueError(f"{call}: path is of place='disk', and place is {place!r}")
    if place == "disk" and (not isinstance(path, str | os.PathLike) or not os.fspath(path)):
        raise ValueError(f"{call}: place='disk' needs path, a directory of its own for the states, got {path!r}")


def refuse(placed: Placed, capturable: Any, max_grad_norm: Any, call: str) -> None:
    """ValueError for what a place cannot do: copies are not captured, and early steps and the host know no norm."""
    if capturable and placed.place != "resident":
        raise ValueError(f"{call}: capturable is of place='resident', and place is {placed.place!r}")
    if max_grad_norm is not None and (placed.place in ("host", "auto") or placed.during_backward):
        where = "during_backward" if placed.during_backward else f"place={placed.place!r}"
        raise ValueError(f"{call}: max_grad_norm needs every gradient's norm before a step, got {where}")


def resume(
    home: Any, placed: Placed, kept: Mapping[int, tuple[torch.Tensor, Layout]], rule: str, call: str
) -> tuple[dict[torch.Tensor, dict[str, Any]], int]:
    """What a place has kept of these parameters, by their numbers, and the number of their steps; ValueError where the
    place keeps nothing."""
    if placed.place != "disk":
        raise ValueError(f"{call}: only place='disk' leaves states to go on with, and place is {placed.place!r}")
    params, layouts = ({k: pair[at] for k, pair in kept.items()} for at in (0, 1))
    return home.resume(params, layouts, rule, call)


def home(placed: Placed) -> Any:
    """What keeps the states there; None where nothing does, because they live beside the weights."""
    if placed.place == "resident":
        return None
    if placed.delay:
        return Delayed(placed.page_bytes, 0)
    if placed.path is not None:
        return OnDisk(placed.page_bytes, Path(placed.path).absolute(), placed.keep_weights)
    return HOMES[placed.place](placed.page_bytes, placed.resident_bytes, placed.during_backward)
