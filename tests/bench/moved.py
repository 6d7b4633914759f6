"""Bytes that a step must move, by the passes that its rule takes through memory.

>>> must_move("element", p=2, g=2, states=8), must_move("lamb", p=2, g=2, states=8)
(22, 34)
"""

from __future__ import annotations

from typing import NamedTuple


class Reads(NamedTuple):
    """How often a step reads each; weights and states are written once."""

    p: int = 1
    g: int = 1
    states: int = 1


PASSES = {
    "element": Reads(),
    "lamb": Reads(p=2, g=2, states=2),
    "adafactor": Reads(p=1, g=2, states=1),
    "came": Reads(p=1, g=4, states=2),
}
"""The fewest passes of a rule.

element    one: everything once.
lamb       two: the norms of p and of the update, which nothing keeps; then the same again, and what is written.
adafactor  the means of rows and columns of g * g, then the update: p and g, g again. An update that is clipped by its
           own RMS, and a rate that follows RMS(p), need `CLIPPED`.
came       four: means of g * g; the update's RMS; means of (U - m)^2, which needs g and m; the update.
"""

CLIPPED = {"adafactor": Reads(p=2, g=3, states=2)}
"""Three passes: RMS(p) and the means; RMS(U); the update."""


def must_move(rule: str, p: int, g: int, states: int, passes: dict[str, Reads] = PASSES) -> int:
    """Bytes of one step, where weights, gradients and states take so many; for tensors or for an element."""
    reads = passes[rule]
    return p * (reads.p + 1) + g * reads.g + states * (reads.states + 1)
