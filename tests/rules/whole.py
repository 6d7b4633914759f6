"""A small case of matrices whose results are published as words, for the rules that see whole tensors."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.strategies import f32

P = f32([[1, -2, 0.5], [0.25, 0, -1]])
G = [
    f32([[0.1, -0.2, 0.3], [0, 0.4, -0.5]]),
    f32([[-0.05, 0.4, 0.3], [1e-3, -0.1, 0.2]]),
    f32([[2, 0, -0.7], [0.6, -1, 0.05]]),
]


def hex_words(x: Any) -> str:
    """The words of a float32 array."""
    return " ".join(f"{w:08x}" for w in np.ascontiguousarray(x, f32).reshape(-1).view(np.uint32).tolist())
