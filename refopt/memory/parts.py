"""How many bytes a training set-up takes, part by part: weights, gradients, states, activations, on one device.

Nothing is allocated: an Optimizer's records say what its states are, to the byte, for tensors of any shape. What no
record can know is estimated, and said to be: `activations` counts the fewest tensors that autograd can keep in a
decoder-only transformer (bfloat16, fused norms, no dropout but for GPT-2's), `scratch` the temporaries of a step. What
torch and transformers make of it is in `timeline`; an allocator's slack comes on top of both.

States of 7B weights, in bytes a weight:

>>> from refopt import Optimizer, memory, models
>>> seven = models.named("llama-2-7b")
>>> for rule, codec in (("adamw", None), ("adamw", "dynamic8"), ("lion", "dynamic8"), ("adafactor", None)):
...     print(rule, codec, round(memory.states(Optimizer(rule, codec), seven.shapes) / seven.size, 4))
adamw None 8.0
adamw dynamic8 2.0312
lion dynamic8 1.0156
adafactor None 0.0017

QLoRA on one sequence of 512 tokens (Dettmers et al., arXiv 2305.14314):

>>> opt = Optimizer("adamw", {"p": "bf16"})
>>> need = memory.train(seven, opt, lora=64, base="double", batch=1, sequence=512, checkpoint=True)
>>> print(need)
weights        0.320 GB   0.298 GiB
frozen         3.866 GB   3.600 GiB
gradients      0.320 GB   0.298 GiB
master         0.000 GB   0.000 GiB
states         1.279 GB   1.191 GiB
scratch        0.090 GB   0.084 GiB
activations    0.377 GB   0.351 GiB
total          6.251 GB   5.822 GiB
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from refopt import codecs as _codecs
from refopt.assign import lookup
from refopt.cells import stretch_bytes
from refopt.memory.kinds import Chosen, apart, chief
from refopt.memory.scratch import scratch
from refopt.models import Model, Shape
from refopt.spec import Codec
from refopt.step import Optimizer

GB, GIB = 10**9, 2**30


class Bytes(NamedTuple):
    """What one device holds, part by part; `host` and `disk` are elsewhere and not in `total`."""

    weights: int = 0
    frozen: int = 0
    gradients: int = 0
    master: int = 0
    states: int = 0
    scratch: int = 0
    activations: int = 0
    host: int = 0
    disk: int = 0

    @property
    def total(self) -> int:
        return sum(self[: self._fields.index("host")])

    def __str__(self) -> str:
        away = [n for n in ("host", "disk") if getattr(self, n)]
        names = [*self._fields[: self._fields.index("host")], "total", *away]
        return "\n".join(f"{n:<11}{getattr(self, n) / GB:9.3f} GB{getattr(self, n) / GIB:8.3f} GiB" for n in names)


def state_of(opt: Optimizer, shape: Shape) -> dict[str, int]:
    """Bytes of each state of a tensor of this shape; `p`: what the weights' codec keeps beside the visible weights."""
    size, weights = math.prod(shape), opt.codecs["p"]
    out = {}
    for st in opt.states:
        form = st.shape_for(shape, opt.hyper)
        if form is not None:
            out[st.name] = stretch_bytes(opt.codec_of(st.name, size), st.dtype, form, 0, math.prod(form))
    if len(weights.parts) > 1:
        out["p"] = sum(size * np.dtype(part.dtype).itemsize for part in weights.parts[1:])
    if opt.delay:
        out["pending"] = 4 * size
    return out


def states(opt: Chosen, model: Model | Sequence[Shape]) -> int:
    """Bytes of all states of a model's tensors, or of tensors of these shapes, exactly."""
    return sum(
        count * sum(state_of(one, shape).values())
        for one, shapes in apart(opt, model)
        for shape, count in Counter(shapes).items()
    )


def share(total: int, size: int, ranks: int, block: int) -> int:
    """A rank's part of `total` bytes that belong to `size` elements, laid on a line and padded (ZeRO)."""
    if ranks == 1 or not size:
        return total
    stretch = -(-size // (ranks * block)) * block
    return -(-total * stretch // size)


def train(
    model: Model | Sequence[Shape],
    opt: Chosen,
    *,
    gradient_bytes: int | None = None,
    release: bool = False,
    master: bool = False,
    lora: int = 0,
    base: str | Codec = "bf16",
    batch: int = 0,
    sequence: int = 0,
    checkpoint: bool = False,
    flash: bool = True,
    ranks: int = 1,
    stage: int = 1,
) -> Bytes:
    """What one device holds in a training step.

    - model: a Model, or the shapes of all weights (then without activations and LoRA)
    - opt: its codec of `p` says what weights take, its place where states are; a `Split` for rules that step some kinds
      of tensors alone
    - gradient_bytes: of one element; as the visible weights by default
    - release: a gradient is stepped and dropped while the next is computed, so that the largest alone is held
    - master: a float32 copy of the weights is kept beside 16-bit ones (AMP)
    - lora: the rank of adapters on every matrix inside the blocks, 0 for none; `base` is the codec of these matrices,
      and the other weights are frozen in bfloat16
    - batch, sequence: tokens of a step; checkpoint: activations are computed again in the backward pass; flash:
      attention keeps no matrix of sequence by sequence
    - ranks, stage: ZeRO's, for weights, gradients and states; activations are each rank's own
    """
    shapes = _check(model, lora, ranks, stage, batch, sequence)
    frozen = 0
    if lora and isinstance(model, Model):
        frozen, shapes = _frozen(model, lookup("codec", _codecs.CODECS, base)), adapters(model, lora)
    trained, first = shapes if lora else model, chief(opt)
    size, wide = sum(math.prod(s) for s in shapes), first._visible_bytes(1)
    each = wide if gradient_bytes is None else gradient_bytes
    largest = max((math.prod(s) for s in shapes), default=0)
    cut = {least: ranks if stage >= least else 1 for least in (1, 2, 3)}
    kept = share(states(opt, trained), size, cut[1], first.block)
    gradients = each * largest if release else share(each * size, size, cut[2], first.block)
    device, host, disk = _placed(first, shapes, kept)
    return Bytes(
        weights=share(wide * size, size, cut[3], first.block),
        frozen=frozen,
        gradients=gradients,
        master=share(4 * size, size, cut[1], first.block) if master else 0,
        states=device,
        scratch=scratch(opt, trained, release or ranks > 1) + (_dequantised(model, base) if lora else 0),
        activations=activations(model, batch, sequence, checkpoint, flash) if isinstance(model, Model) else 0,
        host=host,
        disk=disk,
    )


def adapters(model: Model, rank: int) -> list[Shape]:
    """Shapes of LoRA's A (rank, in) and B (out, rank) for every matrix inside the blocks."""
    return [shape for out, into in model.linears() for shape in ((rank, into), (out, rank))]


def activations(model: Model, batch: int, sequence: int, checkpoint: bool = False, flash: bool = True) -> int:
    """Bytes that autograd keeps for the backward pass, and the logits with their gradient: counted, not measured.

    A block of the Llama family keeps 2 s b (6 h + 2 kv + 4 f) bytes, GPT-2's 34 s b h (Korthikanti et al., arXiv
    2205.05198, equation 2); attention without a fused kernel 6 or 5 a s^2 b more. With checkpoints each block keeps its
    input, and one block at a time the rest.
    """
    tokens, block = batch * sequence, _block(model, batch, sequence, flash)
    blocks = model.layers * 2 * tokens * model.hidden + block if checkpoint else model.layers * block
    return blocks + tokens * model.vocab * (2 + 4 + 4)


def _block(model: Model, batch: int, sequence: int, flash: bool) -> int:
    """What one block keeps."""
    tokens, h = batch * sequence, model.hidden
    if not model.gated:
        return 34 * tokens * h + (0 if flash else 5 * model.heads * sequence * tokens)
    return 2 * tokens * (6 * h + 2 * model.kv + 4 * model.ffn) + (0 if flash else 6 * model.heads * sequence * tokens)


def _check(model: Any, lora: int, ranks: int, stage: int, batch: int, sequence: int) -> list[Shape]:
    for name, value, least in (("lora", lora, 0), ("ranks", ranks, 1), ("batch", batch, 0), ("sequence", sequence, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"memory.train: {name} must be whole and >= {least}, got {value!r}")
    if stage not in (1, 2, 3):
        raise ValueError(f"memory.train: stage must be 1, 2 or 3, got {stage!r}")
    if isinstance(model, Model):
        smallest = min((min(shape) for shape in model.linears()), default=0)
        if lora > smallest:
            raise ValueError(f"memory.train: lora must be <= {smallest}, the smallest side of a matrix, got {lora}")
        return model.shapes
    if lora or batch:
        raise TypeError("memory.train: lora and batch need a Model, which says what its blocks are; got shapes")
    return [tuple(shape) for shape in model]


def _frozen(model: Model, base: Codec) -> int:
    """Bytes of the weights under adapters: matrices in `base`, the rest in bfloat16."""
    linears = model.linears()
    counted = sum(base.nbytes(shape) * count for shape, count in Counter(linears).items())
    return counted + 2 * (model.size - sum(math.prod(s) for s in linears))


def _dequantised(model: Any, base: Any) -> int:
    """The largest matrix in bfloat16, where it is stored in another form."""
    stem = lookup("codec", _codecs.CODECS, base).stem
    return 0 if stem in ("bf16", "f32") else 2 * max(math.prod(shape) for shape in model.linears())


def _placed(opt: Optimizer, shapes: Sequence[Shape], kept: int) -> tuple[int, int, int]:
    """Bytes of states on (device, host, disk)."""
    if opt.place.stem == "resident":
        return kept, 0, 0
    if opt.place.stem == "host":
        return 0, kept, 0
    ring = opt.place.buffers * max((load.page for load in map(opt._load, set(map(tuple, shapes)))), default=0)
    return (ring, kept, 0) if opt.place.stem == "paged" else (0, ring, 2 * kept)
