"""What can be trained with what: every combination of method, weights, class and gradients that makes sense.

Classes are those of `refopt_cuda.optim`. Left out are rules that need groups of their own (Muon, GaLore, APOLLO,
Adam-mini, SM3), formats of weights that another beats (`bf16_kahan` takes the bytes of `bf16_rem16` and is not exact;
plain `bf16` those of `bf16_sr` and loses small steps: it stands for comparison, and where a class takes no other), and
adapters in a place: their states are small.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from refopt.step import Optimizer

CLASSES: dict[str, tuple[str, str | None]] = {
    "AdamW": ("adamw", None),
    "AdamW8bit": ("adamw", "dynamic8"),
    "AdamWFp8": ("adamw", "fp8"),
    "AdamW4bit": ("adamw", "q4"),
    "Lion": ("lion", None),
    "Lion8bit": ("lion", "dynamic8"),
    "Lion4bit": ("lion", "q4"),
    "AdEMAMix8bit": ("ademamix", "dynamic8"),
    "Adafactor": ("adafactor", None),
    "CAME": ("came", None),
}
"""Rule and codec of a class."""
WHOLE = ("Adafactor", "CAME")
"""Classes that see whole tensors; shown with plain weights and states beside them."""
PAGED = ("AdamW", "AdamW8bit", "AdamW4bit", "Lion", "Lion8bit")
HOSTED = ("AdamW", "Lion")
WEIGHTS = ("f32", "bf16_rem16", "bf16_ecc", "bf16_sr")
PLAIN = ("AdamW", "AdamW8bit", *WHOLE)
"""Classes that are shown with plain bfloat16 weights."""
METHODS = ("full", "lora", "qlora")
ADAPTERS = ("AdamW", "AdamW8bit", "Lion", "Lion8bit")


@dataclass(frozen=True)
class Setup:
    """One way to train. method: full, lora or qlora; weights: the codec of what trains; name: the class without its
    place; place: resident, paged or host; release: a gradient is stepped in the backward pass and dropped."""

    method: str
    weights: str
    name: str
    place: str = "resident"
    release: bool = False

    @property
    def cls(self) -> str:
        """The class in `refopt_cuda.optim`."""
        return f"Paged{self.name}" if self.place == "paged" else self.name

    @property
    def rule(self) -> str:
        return CLASSES[self.name][0]

    @property
    def codec(self) -> str:
        return CLASSES[self.name][1] or "f32"

    @property
    def stored(self) -> str:
        """What most weights are kept in."""
        return "nf4" if self.method == "qlora" else self.weights

    @property
    def visible(self) -> int:
        """Bytes of a weight and of its gradient."""
        return 4 if self.weights == "f32" else 2

    @property
    def label(self) -> str:
        """All of it in a few words."""
        words = [self.method, self.stored, self.cls, "on the host" if self.place == "host" else ""]
        return " ".join(filter(None, [*words, "in backward" if self.release else ""]))

    def optimizer(self) -> Optimizer:
        """The record of what is stored, wherever that is."""
        roles: dict[str, str] = {"p": self.weights}
        coded = CLASSES[self.name][1]
        if coded:
            roles |= {s.name: coded for s in Optimizer(self.rule).states if s.coded}
        return Optimizer(self.rule, roles, min_size=4096)


def setups(method: str = "any", ranks: int = 1, stage: int = 0) -> Iterator[Setup]:
    """Every combination, of one method or of all. States of shards stay beside them, in one step after backward."""
    if method in ("any", "full"):
        yield from _full(ranks > 1 and stage > 0)
    for kind in ("lora", "qlora"):
        if method in ("any", kind):
            yield from (Setup(kind, "bf16", name) for name in ADAPTERS)


def _full(sharded: bool) -> Iterator[Setup]:
    yield from (Setup("full", "f32", name) for name in WHOLE)
    yield from (Setup("full", "bf16", name) for name in PLAIN)
    for weights in WEIGHTS:
        for name in (n for n in CLASSES if n not in WHOLE):
            yield Setup("full", weights, name)
            if not sharded:
                yield Setup("full", weights, name, release=True)
        if not sharded:
            yield from (Setup("full", weights, name, "paged") for name in PAGED)
            yield from (Setup("full", weights, name, "host") for name in HOSTED)
