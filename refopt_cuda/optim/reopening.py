"""States that `place="disk"` left in a directory: what they are, and whether an optimizer keeps the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from refopt.spec import StateError
from refopt_cuda.optim import filed, sharded, states
from refopt_cuda.places.records import Extent, Filed, gather
from refopt_cuda.places.vault import Vault, newest


def reopened(
    folder: Path,
    stamp: dict[str, Any] | None,
    params: Mapping[int, torch.Tensor],
    layouts: Mapping[int, states.Layout],
    rule: str,
    stays: bool,
    call: str,
) -> tuple[Vault, dict[tuple[int, str], Filed], dict[torch.Tensor, torch.Tensor]]:
    """A directory of before, where each array lies in it, and the weights that were kept there.

    stamp    the step to go on with; where it is not the newest, all its pages are looked at
    """
    gpu = any(p.is_cuda for p in params.values())
    vault = Vault(folder, call, adopt=True, stamp=stamp, stays=stays, gpu=gpu)
    try:
        found = read(vault, params, layouts, rule, call)
        if stamp not in (None, newest(folder)):
            vault.verify()
        return vault, found, weights(found, params)
    except BaseException:
        vault.close(keep=True)
        raise


def read(
    vault: Vault, params: Mapping[int, torch.Tensor], layouts: Mapping[int, states.Layout], rule: str, call: str
) -> dict[tuple[int, str], Filed]:
    """Where each array lies in a directory. StateError where its states are others than this optimizer keeps."""
    note, where = vault.note, f"{call}: {str(vault.folder)!r}"
    if note["rule"] != rule:
        raise StateError(f"{where} holds states of {note['rule']!r}, this optimizer's rule is {rule!r}")
    if note["loose"]:
        raise StateError(
            f"{where}: states of parameters {note['loose']} were loaded and never stepped: not all is here"
        )
    if unknown := sorted(set(map(int, note["steps"])) - params.keys()):
        raise StateError(f"{where} holds states of parameter {unknown[0]}, this optimizer has {len(params)} parameters")
    out: dict[tuple[int, str], list[Extent]] = {}
    for data in reversed(vault.data):  # the newest words count
        for number, theirs in data.about["entries"].items():
            if theirs != (mine := filed.layout(layouts[int(number)], params[int(number)])):
                raise StateError(f"{where}: parameter {number} has states {theirs}, this optimizer keeps {mine}")
        for record, spans in zip(data.records, data.about["spans"], strict=True):
            for number, key, start, size, offset in spans if record.latest else ():
                found = out.setdefault((number, key), [])
                found += Extent(start, size, record, offset).apart_from(found)
    made = {at: Filed(found) for at, found in out.items()}
    for number in map(int, note["steps"]):
        for part in layouts[number].all if filed.in_files(layouts[number], params[number]) else ():
            if (number, part.key) not in made or not made[number, part.key].covers(
                filed.here(part, params[number]).bytes
            ):
                raise StateError(f"{where}: {part.key!r} of parameter {number} is not whole")
    return made


def weights(
    found: Mapping[tuple[int, str], Filed], params: Mapping[int, torch.Tensor]
) -> dict[torch.Tensor, torch.Tensor]:
    """For each parameter whose weights were kept: what they were after the last complete step, in host memory."""
    kept = {params[number]: source for (number, key), source in found.items() if key == filed.WEIGHTS}
    out = {p: torch.empty(sharded.local(p).shape, dtype=p.dtype) for p in kept}
    gather((source, 0, filed.bytes_of(out[p])) for p, source in kept.items())
    return out
