"""What a step of a rule makes beside weights, gradients and states, as the classes of `refopt_cuda.optim` take it.

Kernels of element rules, and of float32 states of LAMB, Adafactor, CAME and Adam-mini, make nothing. The others are
counted from what their passes allocate; the suite goes through those passes and counts, and holds what one H100 has
measured against it (docs/bench/peaks_more.json).

>>> from refopt import Optimizer, memory
>>> memory.scratch(Optimizer("adamw", "dynamic8"), [(4096, 4096)]), memory.scratch(Optimizer("muon"), [(2048, 2048)])
(0, 41943040)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from refopt.memory.kinds import Chosen, apart
from refopt.models import Model, Shape
from refopt.step import Optimizer

ROOM = 2**30
"""Bytes within which Muon steps matrices of one shape together; classes take this and what follows from here."""
PIECE = 2**28
"""Bytes of a matrix beyond which its products are made in place, piece by piece, instead of beside it."""
LONG = 1.5
"""Ratio of the sides from which on Muon's products are those of the Gram matrix."""
MOST = 1 << 24
"""Elements that are decoded, or projected, at a time: those of one tensor if it has more."""


def scratch(opt: Chosen, model: Model | Sequence[Shape], alone: bool = False) -> int:
    """Bytes of the temporaries of a step at the highest; alone: tensors are stepped one by one, as in backward."""
    found = (RULES.get(one.rule.stem, _whole)(one, shapes, alone) for one, shapes in apart(opt, model) if shapes)
    return max(found, default=0)


def _together(sizes: Sequence[int], alone: bool) -> int:
    """Elements that are there at a time."""
    return max(sizes) if alone else max(*sizes, min(MOST, sum(sizes)))


def _wide(opt: Optimizer) -> int:
    """Bytes of a float32 copy of an element, where weights and gradients have 16 bits."""
    return 4 if opt._visible_bytes(1) == 2 else 0


def _whole(opt: Optimizer, shapes: Sequence[Shape], alone: bool) -> int:
    """Coded states of a rule that sees whole tensors are decoded for its step."""
    if opt.rule.scope == "element":
        return 0
    sizes, decoded = [*map(math.prod, shapes)], [0]
    for shape, size in zip(shapes, sizes, strict=True):
        forms = [s.shape_for(shape, opt.hyper) for s in opt.states if opt.codec_of(s.name, size).stem != "f32"]
        decoded.append(sum(4 * math.prod(form) for form in forms if form is not None))
    return max(decoded) * _together(sizes, alone) // max(*sizes, 1)


def _muon(opt: Optimizer, shapes: Sequence[Shape], alone: bool) -> int:
    """Stacks of float16: the matrices, what follows them, and their Gram matrices; a momentum that is decoded."""
    held = [0]
    for shape, count in Counter(tuple(sorted(s)) for s in shapes if len(s) == 2).items():
        m, n = shape
        squares = 2 if n <= LONG * m else 5
        each = 2 * m * n + min(2 * m * n, PIECE) + squares * 2 * m * m
        each += 4 * m * n * (opt.codecs["B"].stem != "f32")
        held.append((1 if alone else min(count, max(1, ROOM // each))) * (each + 2 * m * m))
    return max(held)


def _projected(opt: Optimizer, shapes: Sequence[Shape], alone: bool) -> int:
    """Elements of projected gradients that are there at a time."""
    return _together([math.prod(opt.rule.shapes(s, opt.hyper)["m"]) for s in shapes], alone)


def _galore(opt: Optimizer, shapes: Sequence[Shape], alone: bool) -> int:
    """Moments on their way, or the largest matrix and its Gram matrix in float64, where directions are looked for."""
    kept, largest = _projected(opt, shapes, alone), max(map(math.prod, shapes))
    moving = 8 if opt.codecs["m"].stem != "f32" else 12
    return max(moving * kept, 4 * kept + (16 + _wide(opt)) * largest + 32 * max(min(s) for s in shapes) ** 2)


def _apollo(opt: Optimizer, shapes: Sequence[Shape], alone: bool) -> int:
    """Moments on their way, or the largest gradient and its weights in float32."""
    kept, largest = _projected(opt, shapes, alone), max(map(math.prod, shapes))
    moving = 20 if opt.codecs["m"].stem != "f32" else 12
    return max(moving * kept, 8 * kept + 2 * _wide(opt) * largest)


def _sm3(opt: Optimizer, shapes: Sequence[Shape], alone: bool) -> int:
    """Estimates, roots and updates in float32, and the updates of the tensor before."""
    sizes = [*map(math.prod, shapes)]
    before = [0, *(0 if alone else 4 * n for n in sizes)]
    return max((17 + _wide(opt)) * n + last for n, last in zip(sizes, before, strict=False))


RULES: Mapping[str, Callable[[Optimizer, Sequence[Shape], bool], int]] = {
    "muon": _muon,
    "galore": _galore,
    "apollo": _apollo,
    "sm3": _sm3,
}
"""What a rule's passes make, by its stem."""
