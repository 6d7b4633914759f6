"""Optimizers whose states are files: pairs, and how such a one is left behind."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tests.optim import placed
from tests.optim.pairs import Case
from tests.optim.placed import pages_of


def disk(case: Case, params: Any, folder: Path, size: int = 4000, **options: Any) -> Any:
    return case.make(params, **options, place="disk", path=folder, page_bytes=size)


def pair(
    case: Case, shapes: Any, dtype: torch.dtype, device: str, folder: Path, size: int = 4000, **options: Any
) -> Any:
    """The same optimizer twice: states beside the weights, and in files."""
    return placed.pair(case, shapes, dtype, device, size, {"place": "disk", "path": folder}, **options)


def listed(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.exists() else []


def records_of(opt: Any) -> set[Any]:
    return {opt._home.records[page] for page in pages_of(opt)}


def leave(opt: Any) -> None:
    """End as a process ends: files stay, the lock goes."""
    opt._home.finish()
    opt._home.vault.close(keep=True)
