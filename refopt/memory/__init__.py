"""How many bytes a training set-up takes, before anything is allocated.

`parts` adds up what one device holds, part by part; `timeline` follows a step of torch and transformers and takes the
largest moment of it.
"""

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
from refopt.memory.timeline import BLAS, moments, peak

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
