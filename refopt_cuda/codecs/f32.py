"""float32, stored as it is: the element codec of an uncoded state and of float32 weights and gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt_cuda.codecs.forms import Element

DTYPE = np.dtype(np.float32)


def make(o: Any) -> Element:
    """`load(code) -> x` and `store(x) -> code`, both the identity."""

    @o.jit
    def load(code):
        return code

    @o.jit
    def store(x):
        return x

    return Element(load, store)
