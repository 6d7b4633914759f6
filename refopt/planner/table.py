"""`plan`: every set-up of a model on a GPU, in bytes and milliseconds, and which one to take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from refopt import memory
from refopt.memory import Bytes
from refopt.memory.kinds import apart, chief
from refopt.models import MODELS, Model, Shape, from_config, named
from refopt.planner import advice
from refopt.planner.cards import GIGA, Card, card
from refopt.planner.setups import METHODS, Setup, directions, setups
from refopt.planner.snippet import snippet
from refopt.planner.speed import HOST, seconds, untimed
from refopt.step import Optimizer

RING = 3 << 24
"""Bytes of the ring of pages of `refopt_cuda.optim`'s paged classes of elements."""
SLACK = 1.05
"""Bytes that torch's allocator reserves for each that is allocated; 1.045 in the row of QLoRA in the results."""


@dataclass(frozen=True)
class Run:
    """What is trained on: the model (or shapes of its weights), the card, tokens of a step, and how many cards."""

    model: Model | tuple[Shape, ...]
    card: Card
    batch: int = 1
    sequence: int = 2048
    checkpoint: bool = True
    rank: int = 16
    gpus: int = 1
    stage: int = 0
    host: float = HOST

    @property
    def known(self) -> bool:
        """Whether the model's blocks are known: without them there are neither activations nor adapters."""
        return isinstance(self.model, Model)

    @property
    def shapes(self) -> list[Shape]:
        return self.model.shapes if isinstance(self.model, Model) else list(self.model)

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def directions(self) -> int:
        """The rank of GaLore and APOLLO."""
        return directions(self.model) if isinstance(self.model, Model) else 0


@dataclass(frozen=True)
class Row:
    """One set-up: `parts` each at its largest, of one device; `peak` its largest moment, `moment` which one that is;
    `ms` None where the time of a step is not predicted, `untimed` why."""

    setup: Setup
    parts: Bytes
    peak: int
    moment: str
    need: int
    fits: bool
    ms: float | None
    untimed: str
    snippet: str

    @property
    def page(self) -> str:
        """Where the class is documented, in the folder of the documentation."""
        return f"optim.html#refopt_cuda.optim.{self.setup.cls}"

    def json(self) -> dict[str, Any]:
        s = self.setup
        named: dict[str, Any] = {
            "method": s.method,
            "weights": s.stored,
            "rule": s.rule,
            "codec": s.codec,
            "place": s.place,
        }
        beside = s.beside and f"refopt_cuda.optim.{s.beside}"
        named |= {"class": f"refopt_cuda.optim.{s.cls}", "beside": beside, "page": self.page, "release": s.release}
        sizes = {"bytes": self.parts._asdict(), "peak": self.peak, "moment": self.moment, "need": self.need}
        took = {"optimizer_ms": self.ms, "untimed": self.untimed}
        return named | sizes | {"fits": self.fits} | took | {"snippet": self.snippet}


@dataclass(frozen=True)
class Plan:
    """All rows, those that give up least first, and what they are about."""

    run: Run
    rows: tuple[Row, ...]

    @property
    def fitting(self) -> list[Row]:
        return [row for row in self.rows if row.fits]

    @property
    def best(self) -> Row | None:
        """The row to take, None if nothing fits."""
        return next(iter(self.fitting), None)

    def best_of(self, method: str) -> Row | None:
        """The row of one method to take."""
        return next((row for row in self.fitting if row.setup.method == method), None)


def plan(
    model: Any,
    gpu: str | Card,
    *,
    batch: int = 1,
    sequence: int = 2048,
    checkpoint: bool = True,
    rank: int = 16,
    gpus: int = 1,
    zero: int | None = None,
    method: str = "any",
    host_bandwidth: float = HOST,
) -> Plan:
    """Every sensible set-up of `model` on `gpu`, in bytes of one device and milliseconds of a step.

    - model: a `refopt.models.Model`, its name there, a path or dict of a transformers configuration, a torch module
      (its `config` where that is known, else the shapes of its parameters), or shapes
    - gpu: a name in `refopt.planner.CARDS`, a size such as "24GB" or "24GiB", or a `Card`
    - batch, sequence: sequences of a step on one device, and tokens of each; checkpoint: activations are computed twice
    - rank: of adapters, on every matrix inside the blocks
    - gpus, zero: devices, and ZeRO's stage, 0 to 3 (default: 3 where there are several)
    - method: "full", "lora", "qlora" or "any"; host_bandwidth: bytes a second of the host's memory

    Raises ValueError that names the argument.
    """
    stage = (3 if gpus > 1 else 0) if zero is None else zero
    _check(batch=batch, sequence=sequence, rank=rank, gpus=gpus)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"plan: zero must be 0, 1, 2 or 3, got {zero!r}")
    if stage and gpus == 1:
        raise ValueError(f"plan: zero={zero} shares states among devices, and gpus is 1")
    if method not in ("any", *METHODS):
        raise ValueError(f"plan: method must be any, {', '.join(METHODS)}, got {method!r}")
    if not (math.isfinite(host_bandwidth) and host_bandwidth > 0):
        raise ValueError(f"plan: host_bandwidth must be above 0 and finite, got {host_bandwidth!r}")
    chosen = card(gpu) if isinstance(gpu, str) else gpu
    run = Run(shaped(model), chosen, batch, sequence, checkpoint, rank, gpus, stage, host_bandwidth)
    if not run.size:
        raise ValueError("plan: model has no weights")
    if not run.known and method in ("lora", "qlora"):
        raise ValueError(f"plan: method={method!r} needs a model whose blocks are known; got shapes")
    found = (row(run, s) for s in setups(method, gpus, stage, run.known))
    rows = sorted(found, key=lambda r: (advice.points(r.setup), r.peak))
    return Plan(run, tuple(rows))


def _check(**numbers: Any) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"plan: {name} must be whole and >= 1, got {value!r}")


def shaped(model: Any) -> Model | tuple[Shape, ...]:
    """What is known of a model that was given in any of the forms that `plan` takes."""
    if isinstance(model, Model):
        return model
    if hasattr(model, "parameters"):
        config = getattr(model, "config", None)
        try:
            return from_config(config.to_dict()) if config is not None else shaped_by(model.parameters())
        except (ValueError, AttributeError):
            return shaped_by(model.parameters())
    if isinstance(model, Sequence) and not isinstance(model, str):
        return tuple(tuple(map(int, shape)) for shape in model)
    if isinstance(model, str) and (model in MODELS or not Path(model).exists()):
        return named(model)
    return from_config(model)


def shaped_by(tensors: Any) -> tuple[Shape, ...]:
    """Shapes of tensors, each once."""
    return tuple(tuple(map(int, t.shape)) for t in {id(t): t for t in tensors}.values())


def row(run: Run, s: Setup) -> Row:
    """One set-up of a run."""
    opt, trained = s.optimizer(run.directions), run.model
    if s.method != "full":
        trained = tuple(memory.adapters(run.model, run.rank))  # type: ignore[arg-type]
    share = run.gpus if run.stage and s.method == "full" else 1
    shapes = trained.shapes if isinstance(trained, Model) else trained
    size, kept = sum(map(math.prod, shapes)), memory.states(opt, trained)
    moments = moments_of(run, s)
    largest = max(moments, key=lambda name: moments[name].total)
    peak = moments[largest].total
    parts = Bytes(*(max(getattr(m, part) for m in moments.values()) for part in Bytes._fields))
    if s.place == "resident":
        beside = sum(np.dtype(part.dtype).itemsize for part in chief(opt).codecs["p"].parts[1:])
        master = parts.states * beside * size // max(1, kept)
        parts = parts._replace(master=master, states=parts.states - master)
    why = untimed(s)
    ms = None if why else 1e3 * seconds(s, run.card, size // share, kept // share, run.host)
    need = math.ceil(SLACK * peak)
    code = snippet(s, run.rank, run.checkpoint and run.known, run.stage, run.directions)
    return Row(s, parts, peak, largest, need, need <= run.card.usable, ms, why, code)


def moments_of(run: Run, s: Setup) -> dict[str, Bytes]:
    """The moments of a step of one set-up, states in their place."""
    opt = s.optimizer(run.directions)
    return {name: _placed(need, s, ring(opt, run.model)) for name, need in _moments(run, s, opt).items()}


def _placed(need: Bytes, s: Setup, most: int) -> Bytes:
    """States in host memory, and on the device the ring of at most these bytes that they pass through."""
    if s.place == "resident":
        return need
    return need._replace(states=min(need.states, most) if s.place == "paged" else 0, host=need.states)


def ring(opt: Optimizer | memory.Split, model: Any) -> int:
    """Bytes of the ring of pages: a rule that sees whole tensors has pages as large as the largest one's states."""
    whole = [(one, set(shapes)) for one, shapes in apart(opt, model) if one.rule.scope != "element"]
    largest = [sum(memory.state_of(one, shape).values()) for one, shapes in whole for shape in shapes]
    return max(RING, 3 * max(largest, default=0))


def _moments(run: Run, s: Setup, opt: Optimizer | memory.Split) -> dict[str, Bytes]:
    """The moments of a step; for shapes alone, all parts at once."""
    ranks, stage = (run.gpus, run.stage) if run.stage and s.method == "full" else (1, 1)
    setup: dict[str, Any] = {"ranks": ranks, "stage": stage, "release": s.release}
    if not isinstance(run.model, Model):
        whole = memory.train(run.model, opt, **setup)
        return {"step": whole._replace(scratch=whole.scratch + run.card.blas)}
    if s.method != "full":
        setup |= {"lora": run.rank, "base": "double" if s.method == "qlora" else "bf16"}
    setup |= {"batch": run.batch, "sequence": run.sequence, "checkpoint": run.checkpoint, "blas": run.card.blas}
    return memory.moments(run.model, opt, **setup)


def gigabytes(size: float) -> str:
    """Decimal, three figures."""
    return f"{size / GIGA:.2f}" if size < 100 * GIGA else f"{size / GIGA:.0f}"
