"""Steps of transformers' Llama, the most bytes that `traced` finds beside the weights, and the moment at which."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """A model and a step of it; `each`: bytes of an element."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    vocab: int
    batch: int
    sequence: int
    checkpoint: bool = False
    lora: int = 0
    kv: int = 0
    tied: bool = False
    each: int = 2


SEVEN = {"hidden": 4096, "layers": 4, "heads": 32, "ffn": 11008, "vocab": 32000}
ONE = {"hidden": 2048, "layers": 4, "heads": 32, "ffn": 8192, "vocab": 128256, "kv": 8, "tied": True}
SMALL = {"hidden": 768, "layers": 12, "heads": 12, "ffn": 2048, "vocab": 32000}
FEW = SEVEN | {"vocab": 1000}
"""Few words, so that other moments than the loss are the largest."""
LONG = {"batch": 4, "sequence": 2048}

TRACED: list[tuple[Step, str, int]] = [
    (Step(**SEVEN, batch=1, sequence=512), "embedding", 2147557384),
    (Step(**SEVEN, batch=1, sequence=2048), "loss", 2382438504),
    (Step(**SEVEN, batch=1, sequence=2048, checkpoint=True), "embedding", 2160140296),
    (Step(**SEVEN, **LONG, checkpoint=True), "loss", 3683696648),
    (Step(**SEVEN, batch=1, sequence=512, checkpoint=True, lora=64), "loss", 222042120),
    (Step(**SEVEN, **LONG, lora=64), "loss", 8750628968),
    (Step(**ONE, batch=1, sequence=512), "embedding", 2062585864),
    (Step(**ONE, batch=4, sequence=1024, checkpoint=True), "loss", 6438543368),
    (Step(**ONE, batch=1, sequence=2048, lora=16), "loss", 3977576552),
    (Step(**SMALL, batch=8, sequence=1024), "loss", 6624411944),
    (Step(**SMALL, batch=4, sequence=1024, each=4), "loss", 4734468392),
    (Step(**FEW, batch=1, sequence=2048), "input", 1846681632),
    (Step(**FEW, batch=1, sequence=512, checkpoint=True), "input", 1686253576),
    (Step(**FEW, **LONG, checkpoint=True), "first", 3336511520),
    (Step(**FEW, **LONG, checkpoint=True, lora=64), "last", 2099167264),
    (Step(**FEW, **LONG, lora=64), "norm", 6275956840),
    (Step(**FEW, **LONG, checkpoint=True, each=4), "first", 6269239328),
    (Step(**FEW, **LONG, checkpoint=True, each=4, lora=64), "last", 3794550816),
    (Step(2048, 4, 16, 4096, 1000, **LONG), "norm", 3094515816),
]
