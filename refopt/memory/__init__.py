"""How many bytes a training set-up takes, before anything is allocated.

`parts` adds up what one device holds, part by part; `moments` follows a step of torch and transformers and takes the
largest moment of it.
"""

from refopt.memory.moments import BLAS, moments, peak
from refopt.memory.parts import (
    GB,
    GIB,
    SCRATCH,
    Bytes,
    activations,
    adapters,
    scratch,
    share,
    state_of,
    states,
    train,
)

__all__ = [
    "BLAS",
    "GB",
    "GIB",
    "SCRATCH",
    "Bytes",
    "activations",
    "adapters",
    "moments",
    "peak",
    "scratch",
    "share",
    "state_of",
    "states",
    "train",
]
