"""bfloat16 words: the upper half of a float32, widened exactly and rounded once to nearest even."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Element, narrowed, widened

DTYPE = np.dtype(np.uint16)


def make(o: Any) -> Element:
    """`load(word) -> x` and `store(x) -> word` over uint16 words."""
    return Element(widened(o), narrowed(o))
