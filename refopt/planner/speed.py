"""How long a step of the optimizer takes: the bytes that it must move, at what a data sheet promises and kernels reach.

The shares are those of the rows of one H100 in `docs/bench/results.csv`; `tests/planner` holds the prediction beside
every such row.
"""

from __future__ import annotations

from refopt.planner.cards import Card
from refopt.planner.setups import Setup

ELEMENT, WHOLE, LINK = 0.82, 0.73, 0.74
"""Shares of the data sheet's memory bandwidth that steps of elements and of whole tensors reach; of the link's, both
ways at once, that pages reach."""
HOST = 100 * 10**9
"""Bytes a second of the host's memory, assumed: 16 cores on two channels reach about this."""
READS = {"adafactor": (2, 3, 2), "came": (1, 4, 2), "lamb": (2, 2, 2)}
"""How often a rule of whole tensors reads weights, gradients and states; others once."""
SHARE = {"adafactor": WHOLE, "came": WHOLE}
"""Share of the memory's bandwidth that a rule reaches; others ELEMENT."""
UNTIMED = {
    "muon": "products of matrices take the time, not bytes",
    "galore": "products of matrices and the search for directions take the time, not bytes",
    "apollo": "products of matrices take the time, not bytes",
    "adam_mini": "no GPU has measured its time",
    "sm3": "no GPU has measured its time",
}
"""Why the step of a rule is not predicted."""


def untimed(setup: Setup) -> str:
    """Why the time of a set-up's step is not predicted; "" where it is."""
    if setup.rule in READS and setup.codec != "f32":
        return "its states are decoded for the passes, whose time nothing predicts yet"
    if setup.rule in READS and setup.place != "resident":
        return "pages of whole tensors, whose time nothing predicts yet"
    return UNTIMED.get(setup.rule, "")


def seconds(setup: Setup, card: Card, size: int, states: int, host: float = HOST) -> float:
    """Of one step over `size` weights with `states` bytes of states, wherever these are: the slowest of memory, link
    and host, which work at the same time."""
    p = g = setup.visible * size
    reads = READS.get(setup.rule, (1, 1, 1))
    moved = p * (reads[0] + 1) + g * reads[1] + states * (reads[2] + 1)
    if setup.place == "host":
        return max(g / (LINK * card.link), (moved + p) / host)
    device = moved / (card.bandwidth * SHARE.get(setup.rule, ELEMENT))
    return max(device, states / (LINK * card.link)) if setup.place == "paged" else device
