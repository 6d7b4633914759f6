"""refopt: memory-efficient optimizers in readable NumPy, the reference that faster ones are checked against.

Every optimizer is a Rule, with a Codec for each thing it stores, in a Place.
"""

from refopt import codecs, memory, models, places, qlora, rules
from refopt.partition import Partition
from refopt.spec import Box, NonFiniteError, ShapeError, StateError
from refopt.step import Optimizer
from refopt.trace import trace

__version__ = "0.1.0"
__all__ = [
    "Box",
    "NonFiniteError",
    "Optimizer",
    "Partition",
    "ShapeError",
    "StateError",
    "codecs",
    "memory",
    "models",
    "places",
    "qlora",
    "rules",
    "trace",
]
