"""bfloat16 weights with a running compensation (Zamirai et al., arXiv:2010.06192, algorithm 1)."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Weight, narrowed, widened

RANDOM = False


def rest_dtype() -> np.dtype:
    """Of the compensations, bfloat16 words."""
    return np.dtype(np.uint16)


def make(o: Any) -> Weight:
    """`open(word, rest)` and `close(x, word, rest, r)`; r is not used."""
    add, sub, value, rounded = o.add, o.sub, widened(o), narrowed(o)

    @o.jit
    def open_(word, rest):
        return value(word)

    @o.jit
    def close(x, word, rest, r):
        old = value(word)
        c = value(rounded(add(value(rest), sub(x, old))))
        p = rounded(add(old, c))
        return p, rounded(add(c, value(rounded(sub(old, value(p))))))

    return Weight(open_, close)
