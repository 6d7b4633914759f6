"""The main job by each front end: the losses of a plain torch loop, to the last bit."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("torch")
EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def losses(name: str) -> list[float]:
    return runpy.run_path(str(EXAMPLES / name))["losses"]


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return losses("20_plain_loop.py")


@pytest.mark.parametrize(
    ("package", "example"),
    [
        ("transformers", "21_hf_trainer.py"),
        ("accelerate", "22_accelerate.py"),
        ("lightning", "23_lightning.py"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of those packages
def test_a_front_end_has_the_losses_of_the_plain_loop(plain: list[float], package: str, example: str) -> None:
    pytest.importorskip(package)
    assert losses(example) == plain
    assert len(plain) == 12 and plain[-1] < 0.7 * plain[0]
