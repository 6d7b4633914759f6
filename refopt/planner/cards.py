"""GPUs: memory, memory bandwidth, link and speed of products, from the vendor's data sheets.

Memory is binary (a card sold as 24 GB has 24 GiB), speeds decimal. The link is one way; both ways run at once. Measured
figures are lower: an H100 copies at 3.03 of its 3.35 TB/s, and moves 49.9 of its link's 64 GB/s each way.

>>> card("rtx-4090").memory, card("24GiB").memory, card("24GB").memory
(25769803776, 25769803776, 24000000000)
>>> card("24GB")
Card(name='24GB', memory=24000000000, bandwidth=936000000000, link=32000000000, hopper=False, like='rtx-3090')
"""

from __future__ import annotations

import difflib
import re
from typing import NamedTuple

GIB, GIGA = 2**30, 10**9


class Card(NamedTuple):
    """One GPU: bytes, bytes a second of its memory, bytes a second of its link one way, whether torch gives cuBLAS the
    workspace of Hopper and Blackwell; `like`: the card whose speeds were taken for one that is given by its size."""

    name: str
    memory: int
    bandwidth: int
    link: int
    hopper: bool = False
    like: str = ""

    @property
    def usable(self) -> int:
        """What is left for tensors: less the driver's share and a CUDA context."""
        return max(0, int(0.98 * self.memory) - 600 * 10**6)

    @property
    def blas(self) -> int:
        """Bytes of cuBLAS's two workspaces under torch."""
        return 2 * (2**25 if self.hopper else 8_519_680)


def _of(name: str, gib: int, bandwidth: int, link: int, hopper: bool = False) -> Card:
    return Card(name, gib * GIB, bandwidth * GIGA, link * GIGA, hopper)


CARDS = {
    c.name: c
    for c in (
        _of("rtx-3060", 12, 360, 32),
        _of("rtx-4070", 12, 504, 32),
        _of("rtx-4060-ti-16gb", 16, 288, 16),
        _of("rtx-4080", 16, 717, 32),
        _of("rtx-3090", 24, 936, 32),
        _of("rtx-4090", 24, 1008, 32),
        _of("a10", 24, 600, 32),
        _of("l4", 24, 300, 32),
        _of("rtx-5090", 32, 1792, 64, True),
        _of("a100-40gb", 40, 1555, 32),
        _of("rtx-a6000", 48, 768, 32),
        _of("rtx-6000-ada", 48, 960, 32),
        _of("l40s", 48, 864, 32),
        _of("a100-80gb", 80, 2039, 32),
        _of("h100-pcie", 80, 2000, 64, True),
        _of("h100", 80, 3350, 64, True),
        _of("h100-nvl", 94, 3900, 64, True),
        _of("gh200", 96, 4000, 450, True),
        _of("rtx-pro-6000", 96, 1792, 64, True),
        _of("h200", 141, 4800, 64, True),
        _of("b200", 180, 8000, 64, True),
    )
}
"""Cards by name; `h100` is the SXM form, the link of `gh200` NVLink-C2C, all others PCI Express."""
UNITS = {"gb": GIGA, "g": GIGA, "gib": GIB, "gi": GIB}


def card(name: str) -> Card:
    """A card by name (upper case and spaces do not matter), or one of a size: "24GB" (decimal), "24GiB".

    A card of a size has the speeds of the smallest in the table that holds as much. Raises ValueError for another name.
    """
    key = re.sub(r"[\s_]+", "-", str(name).strip().lower()).removeprefix("nvidia-").removeprefix("geforce-")
    if key in CARDS:
        return CARDS[key]
    size = re.fullmatch(r"(\d+(?:\.\d+)?)-?(gib|gb|gi|g)", key)
    if size is None or float(size[1]) <= 0:
        near = difflib.get_close_matches(key, CARDS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"plan: no GPU {name!r}{hint}; give a size such as 24GB or 24GiB, or {', '.join(CARDS)}")
    memory = int(float(size[1]) * UNITS[size[2]])
    like = next((c for c in CARDS.values() if c.memory >= memory), CARDS["b200"])
    return like._replace(name=str(name), memory=memory, like=like.name)
