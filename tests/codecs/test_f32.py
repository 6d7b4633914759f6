"""f32: every word comes back."""

from __future__ import annotations

from types import ModuleType

import numpy as np

from tests.strategies import f32


def test_every_kind_of_word_comes_back(ref: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 10000, np.uint32)
    x[:6] = [0, 0x80000000, 1, 0x7F800000, 0x7FC00001, 0xFF800000]
    box = ref.codecs.f32.encode(x.view(f32))
    assert box.decode().view(np.uint32).tolist() == x.tolist() and box.codes is not x
