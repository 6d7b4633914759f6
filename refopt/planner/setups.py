"""What can be trained with what: every combination of method, weights, class and gradients that makes sense.

Classes are those of `refopt_cuda.optim`; Muon, GaLore and APOLLO step the matrices inside the blocks, AdamW the rest.
Left out are rules that nobody trains language models with and that save nothing beside these (SGD, RMSprop, Adagrad,
Signum, LARS, Adam with coupled decay), formats of weights that another beats (`bf16_kahan` takes the bytes of
`bf16_rem16` and is not exact; plain `bf16` those of `bf16_sr` and loses small steps: it stands for comparison, and
where a class takes no other), adapters in a place, whose states are small, and adapters under rules of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from refopt.memory import Split
from refopt.models import Model
from refopt.step import Optimizer

CLASSES: dict[str, tuple[str, str | None]] = {
    "AdamW": ("adamw", None),
    "AdamW8bit": ("adamw", "dynamic8"),
    "AdamWFp8": ("adamw", "fp8"),
    "AdamW4bit": ("adamw", "q4"),
    "Lion": ("lion", None),
    "Lion8bit": ("lion", "dynamic8"),
    "Lion4bit": ("lion", "q4"),
    "AdEMAMix": ("ademamix", None),
    "AdEMAMix8bit": ("ademamix", "dynamic8"),
    "Adafactor": ("adafactor", None),
    "CAME": ("came", None),
    "CAME8bit": ("came", "dynamic8"),
    "AdamMini": ("adam_mini", None),
    "AdamMini8bit": ("adam_mini", "dynamic8"),
    "LAMB": ("lamb", None),
    "LAMB8bit": ("lamb", "dynamic8"),
    "SM3": ("sm3", None),
    "Muon": ("muon", None),
    "Muon8bit": ("muon", "dynamic8"),
    "GaLoreAdamW": ("galore", None),
    "GaLoreAdamW8bit": ("galore", "dynamic8"),
    "APOLLOAdamW": ("apollo", None),
    "APOLLOAdamW8bit": ("apollo", "dynamic8"),
    "APOLLO-Mini": ("apollo", None),
}
"""Rule and codec of a class."""
MINI = {"rank": 1, "scale": 128.0, "scale_type": "tensor"}
"""What makes APOLLO-Mini of `APOLLOAdamW`."""
MATRICES = ("muon", "galore", "apollo")
"""Rules of matrices inside the blocks; the rest takes AdamW, its states in the same codec."""
SHARED = ("Adafactor", "CAME", "CAME8bit", "AdamMini", "AdamMini8bit", "LAMB", "LAMB8bit", "Muon", "Muon8bit")
"""Classes that see whole tensors, plain weights, states beside them, and share these among devices."""
WHOLE = (*SHARED, "SM3", "GaLoreAdamW", "GaLoreAdamW8bit", "APOLLOAdamW", "APOLLOAdamW8bit", "APOLLO-Mini")
"""All classes that see whole tensors; the states of the further ones lie whole on every device."""
PAGED = ("AdamW", "AdamW8bit", "AdamW4bit", "Lion", "Lion8bit")
PAGED_WHOLE = ("AdamMini", "LAMB", "CAME")
"""Classes that see whole tensors, shown with states in host memory, too: those of whole tensors pass at a time."""
HOSTED = ("AdamW", "Lion")
WEIGHTS = ("f32", "bf16_rem16", "bf16_ecc", "bf16_sr")
PLAIN = ("AdamW", "AdamW8bit")
"""Classes of elements that are shown with plain bfloat16 weights, too."""
METHODS = ("full", "lora", "qlora")
ADAPTERS = ("AdamW", "AdamW8bit", "Lion", "Lion8bit")


@dataclass(frozen=True)
class Setup:
    """One way to train. method: full, lora or qlora; weights: the codec of what trains; name: the class without its
    place, or "APOLLO-Mini"; place: resident, paged or host; release: a gradient is stepped in the backward pass and
    dropped."""

    method: str
    weights: str
    name: str
    place: str = "resident"
    release: bool = False

    @property
    def cls(self) -> str:
        """The class in `refopt_cuda.optim`."""
        name = "APOLLOAdamW" if self.name == "APOLLO-Mini" else self.name
        return f"Paged{name}" if self.place == "paged" else name

    @property
    def shown(self) -> str:
        """The name with its place."""
        return f"Paged{self.name}" if self.place == "paged" else self.name

    @property
    def beside(self) -> str:
        """The class of what a rule of matrices leaves, "" where one class steps all."""
        return ("AdamW8bit" if CLASSES[self.name][1] else "AdamW") if self.rule in MATRICES else ""

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
        words = [self.method, self.stored, self.shown, "on the host" if self.place == "host" else ""]
        return " ".join(filter(None, [*words, "in backward" if self.release else ""]))

    def optimizer(self, rank: int = 128) -> Optimizer | Split:
        """The record of what is stored, wherever that is; rank: the directions that GaLore and APOLLO keep."""
        if self.rule in MATRICES:
            rest = self._one("adamw")
            words = {"muon": {}, "galore": {"rank": rank}, "apollo": {"rank": rank}}[self.rule]
            return Split(self._one(self.rule, **(MINI if self.name == "APOLLO-Mini" else words)), rest, rest)
        if self.rule == "adam_mini":
            rows = self._one(self.rule)
            return Split(rows, rows, self._one(self.rule, blocks="whole"))
        return self._one(self.rule)

    def _one(self, rule: str, **hyper: Any) -> Optimizer:
        """A rule with this codec for each of its states that takes one."""
        roles: dict[str, str] = {"p": self.weights}
        coded = CLASSES[self.name][1]
        if coded:
            roles |= {s.name: coded for s in Optimizer(rule, **hyper).states if s.coded}
        return Optimizer(rule, roles, min_size=4096, **hyper)


def directions(model: Model) -> int:
    """A rank for GaLore and APOLLO: a quarter of the width, as in their papers, or the smallest side of a matrix."""
    return max(1, min(model.hidden // 4, *map(min, model.linears())))


def setups(method: str = "any", ranks: int = 1, stage: int = 0, known: bool = True) -> Iterator[Setup]:
    """Every combination, of one method or of all. States of shards stay beside them, in one step after backward.

    known: the model's blocks are, and so adapters and rules of matrices may be meant
    """
    if method in ("any", "full"):
        every = _full(ranks > 1 and stage > 0)
        yield from every if known else (s for s in every if s.rule not in MATRICES)
    for kind in ("lora", "qlora"):
        if known and method in ("any", kind):
            yield from (Setup(kind, "bf16", name) for name in ADAPTERS)


def _full(sharded: bool) -> Iterator[Setup]:
    for weights in ("f32", "bf16"):
        yield from (Setup("full", weights, name) for name in (SHARED if sharded else WHOLE))
    if not sharded:
        yield from (Setup("full", "bf16", name, release=True) for name in WHOLE if name not in ("LAMB", "LAMB8bit"))
        yield from (Setup("full", "bf16", name, "paged") for name in PAGED_WHOLE)
    yield from (Setup("full", "bf16", name) for name in PLAIN)
    for weights in WEIGHTS:
        for name in (n for n in CLASSES if n not in WHOLE):
            yield Setup("full", weights, name)
            if not sharded:
                yield Setup("full", weights, name, release=True)
        if not sharded:
            yield from (Setup("full", weights, name, "paged") for name in PAGED)
            yield from (Setup("full", weights, name, "host") for name in HOSTED)
