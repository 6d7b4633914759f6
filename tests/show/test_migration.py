"""The code on the migration pages runs: what follows a replaced import, and where it can, what was before."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from refopt_cuda import optim  # noqa: E402

PAGES = Path(__file__).resolve().parents[2] / "docs" / "migration"
BLOCKS = [
    pytest.param(block, id=f"{page.stem}-{k}")
    for page in sorted(PAGES.glob("*.md"))
    for k, block in enumerate(re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL))
]


def model() -> torch.nn.Module:
    layers = {"embed": torch.nn.Embedding(64, 64), "norm": torch.nn.LayerNorm(64), "head": torch.nn.Linear(64, 64)}
    return torch.nn.Sequential(OrderedDict(layers))


def loss(of: torch.nn.Module) -> torch.Tensor:
    return of(torch.arange(8)).float().square().mean()


@pytest.mark.filterwarnings("ignore:.*(cannot move|bitsandbytes)")
@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_of_a_migration_page_makes_its_optimizers(block: str) -> None:
    for package in ("bitsandbytes", "torchao", "flashoptim"):
        if f"from {package}" in block or f"import {package}" in block:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pytest.importorskip(package)
    known: dict[str, Any] = {"torch": torch, "optim": optim, "model": model(), "loss": loss}
    exec(block, known)
    made = [x for x in known.values() if isinstance(x, torch.optim.Optimizer)]
    assert made or "groups" in block


def test_every_page_has_code_after_the_change() -> None:
    for page in PAGES.glob("*.md"):
        assert page.stem == "index" or "# after\n" in page.read_text("utf-8"), page
