"""Which optimizer steps which tensors: one for all, or one for each kind of tensor in a transformer.

Muon, GaLore and APOLLO take matrices inside the blocks alone, and Adam-mini's blocks of vectors differ from those of
matrices:

>>> from refopt import Optimizer, memory, models
>>> adamw = Optimizer("adamw")
>>> muon = memory.Split(Optimizer("muon"), adamw, adamw)
>>> seven = models.named("llama-2-7b")
>>> round(memory.states(muon, seven) / seven.size, 3)
4.156
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from refopt.models import Model, Shape
from refopt.step import Optimizer


class Split(NamedTuple):
    """An optimizer for each kind of tensor; weights have one codec, and states one place.

    matrices: inside the blocks; tables: matrices outside of them (embedding, positions, head); vectors: norms, biases
    """

    matrices: Optimizer
    tables: Optimizer
    vectors: Optimizer


Chosen = Optimizer | Split


def chief(opt: Chosen) -> Optimizer:
    """The one whose codec of weights and whose place hold for all."""
    return opt if isinstance(opt, Optimizer) else opt.matrices


def apart(opt: Chosen, model: Model | Sequence[Shape]) -> list[tuple[Optimizer, list[Shape]]]:
    """Each optimizer with the shapes that it steps; of shapes without a model all matrices are of one kind.

    Raises TypeError if that is not enough to tell which optimizer steps what.
    """
    if isinstance(opt, Optimizer):
        return [(opt, model.shapes if isinstance(model, Model) else [tuple(s) for s in model])]
    if not isinstance(model, Model) and opt.tables is not opt.matrices:
        raise TypeError("memory: optimizers that tell matrices from tables need a Model, which names both; got shapes")
    named = model.tensors if isinstance(model, Model) else [("", tuple(s)) for s in model]
    kinds: dict[int, tuple[Optimizer, list[Shape]]] = {}
    for name, shape in named:
        inside = isinstance(model, Model) and name.rpartition(".")[2] in model.linear
        one = opt.vectors if len(shape) < 2 else opt.matrices if inside else opt.tables
        kinds.setdefault(id(one), (one, []))[1].append(shape)
    return list(kinds.values())
