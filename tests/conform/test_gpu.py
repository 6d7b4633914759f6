"""What kernels of other libraries compute on a GPU, named without being told."""

from __future__ import annotations

import importlib.util

import pytest

from refopt import conform
from tests.conform.peers import FLASH, PURE

pytestmark = pytest.mark.gpu

BNB = "bitsandbytes.optim:"
FINDS = [
    (BNB + "AdamW", "adamw", "decay-order-after"),
    (BNB + "AdamW8bit", "adamw", "decay-order-after"),
    (BNB + "AdEMAMix8bit", "ademamix", "short-block"),
    (BNB + "RMSprop8bit", "rmsprop", "decay-skips-the-step"),
    (BNB + "Adagrad8bit", "adagrad", "decay-skips-the-step"),
]


@pytest.mark.parametrize(("target", "claim", "id"), FINDS)
def test_a_kernel_of_bitsandbytes_is_named(target: str, claim: str, id: str) -> None:
    pytest.importorskip("bitsandbytes")
    report = conform.run(target, claim, only=["L1"], dtypes=["float32"], device="cuda")
    assert any(id in found for found in report.ids), report.text()


def test_flashoptims_steps_are_followed() -> None:
    if importlib.util.find_spec("flashoptim") is None:
        pytest.skip("flashoptim is not installed")
    report = conform.run(FLASH + "FlashAdamW", "adamw", only=["L1", "L3"], dtypes=["float32"], device="cuda", **PURE)
    assert "unexplained" not in report.ids, report.text()
    assert "compand8" in report.of("L3")[0].text
