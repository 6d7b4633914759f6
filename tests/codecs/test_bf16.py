"""bf16, exhaustively: all 65,536 words, and every kind of float32 between two of them, against ml_dtypes."""

from __future__ import annotations

from types import ModuleType

import ml_dtypes
import numpy as np
import pytest

from tests.bits import same_bits
from tests.strategies import f32

WORDS = np.arange(65536, dtype=np.uint32)


def test_every_word_decodes_as_in_ml_dtypes(ref: ModuleType) -> None:
    codes = WORDS.astype(np.uint16)
    got = ref.Box(ref.codecs.bf16, codes.shape, {"codes": codes}).decode()
    same_bits(got, codes.view(ml_dtypes.bfloat16).astype(f32), "decoded")


def test_every_word_but_nan_comes_back(ref: ModuleType) -> None:
    x = (WORDS << 16).view(f32)
    number = ~np.isnan(x)
    assert (ref.codecs.bf16.encode(x).codes[number] == WORDS[number]).all()


@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], ids=hex)
def test_every_word_is_rounded_as_in_ml_dtypes(ref: ModuleType, low: int) -> None:
    """Ties (0x8000) to even; above the largest number to infinity; NaN stays NaN."""
    x = ((WORDS << 16) | np.uint32(low)).view(f32)
    got = ref.codecs.bf16.encode(x).codes
    with np.errstate(invalid="ignore"):
        want = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    number = ~np.isnan(x)
    assert (got[number] == want[number]).all()
    assert (got[~number] == np.where(np.signbit(x[~number]), 0xFFC0, 0x7FC0)).all()
