"""States that `place="disk"` left in a directory: what they are, and whether an optimizer keeps the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from refopt.spec import StateError
from refopt_cuda.optim import states
from refopt_cuda.places.records import Extent, Filed
from refopt_cuda.places.vault import Vault


def in_files(kept: states.Layout, p: torch.Tensor) -> bool:
    """Whether there is anything of a parameter to keep in a file."""
    return bool(kept.all) and p.numel() > 0


def layout(kept: states.Layout) -> Any:
    """All that the bytes of a parameter's states mean something by, in words that JSON keeps."""
    codings = [[c.form.stem, sorted(map(str, c.form.options.items())), c.block] for c in kept.codings]
    parts = [[part.key, list(part.shape), str(part.dtype)] for part in kept.all]
    return {"codings": codings, "weight": kept.weight.stem if kept.weight else None, "parts": parts}


def read(
    vault: Vault, params: Sequence[torch.Tensor], layouts: Sequence[states.Layout], rule: str, call: str
) -> dict[tuple[int, str], Filed]:
    """Where each array lies in a directory. StateError where its states are others than this optimizer keeps."""
    note, where = vault.note, f"{call}: {str(vault.folder)!r}"
    if note["rule"] != rule:
        raise StateError(f"{where} holds states of {note['rule']!r}, this optimizer's rule is {rule!r}")
    if note["loose"]:
        raise StateError(
            f"{where}: states of parameters {note['loose']} were loaded and never stepped: not all is here"
        )
    if (most := max(map(int, note["steps"]), default=0)) >= len(params):
        raise StateError(f"{where} holds states of parameter {most}, this optimizer has {len(params)} parameters")
    out: dict[tuple[int, str], list[Extent]] = {}
    for data in reversed(vault.data):  # the newest words count
        for number, theirs in data.about["entries"].items():
            if theirs != (mine := layout(layouts[int(number)])):
                raise StateError(f"{where}: parameter {number} has states {theirs}, this optimizer keeps {mine}")
        for record, spans in zip(data.records, data.about["spans"], strict=True):
            for number, key, start, size, offset in spans if record.latest else ():
                found = out.setdefault((number, key), [])
                found += Extent(start, size, record, offset).apart_from(found)
    made = {at: Filed(found) for at, found in out.items()}
    for number in map(int, note["steps"]):
        for part in layouts[number].all if in_files(layouts[number], params[number]) else ():
            if (number, part.key) not in made or not made[number, part.key].covers(part.bytes):
                raise StateError(f"{where}: {part.key!r} of parameter {number} is not whole")
    return made
