"""Dictionaries that remember whether somebody has changed them: a step looks again only where that is so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

__all__ = ["Entries", "Entry", "count", "replace"]


def _noting(name: str) -> Callable:
    """The method of dict by this name, and a note that it was called."""

    def change(self: Any, *args: Any, **words: Any) -> Any:
        self.changed = True
        return getattr(super(type(self), self), name)(*args, **words)

    change.__name__ = change.__qualname__ = name
    return change


WAYS = ("__setitem__", "__delitem__", "__ior__", "clear", "pop", "popitem", "setdefault", "update")
"""Methods that change a dictionary."""


class Entry(dict):
    """`state[p]`: one parameter's states by name."""

    __slots__ = ("changed",)

    def __init__(self, *args: Any, **words: Any) -> None:
        super().__init__(*args, **words)
        self.changed = True

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Entry:
        """Itself, or a copy of a plain dictionary."""
        return entry if isinstance(entry, cls) else cls(entry)


class Entries(defaultdict):
    """`state`: the entries by parameter, as torch.optim keeps them."""

    changed = True

    def give(self, p: Any, entry: Entry) -> None:
        """Put an entry there, unnoted."""
        dict.__setitem__(self, p, entry)


def count(entries: Iterable[Entry], step: Any) -> None:
    """Write the step count, or where a device keeps it, unnoted."""
    put = dict.__setitem__
    for entry in entries:
        put(entry, "step", step)


def replace(entry: Any, tensors: Mapping[str, Any]) -> None:
    """Other tensors in the place of those that an entry has, unnoted."""
    for key, x in tensors.items():
        dict.__setitem__(entry, key, x)


for _way in WAYS:
    setattr(Entry, _way, _noting(_way))
    setattr(Entries, _way, _noting(_way))
