"""How many bytes a training set-up takes, before anything is allocated.

`parts` adds up what one device holds, part by part, `scratch` what a step makes besides, for one optimizer or one for
each of the `kinds` of tensors; `timeline` follows a step of torch and transformers and takes the largest moment of it.
"""

from refopt.memory.kinds import Split
from refopt.memory.parts import (
    GB,
    GIB,
    Bytes,
    activations,
    adapters,
    share,
    state_of,
    states,
    train,
)
from refopt.memory.scratch import scratch
from refopt.memory.timeline import BLAS, moments, peak

__all__ = [
    "BLAS",
    "GB",
    "GIB",
    "Bytes",
    "Split",
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
