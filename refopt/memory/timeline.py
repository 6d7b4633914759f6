"""The moments of a training step at which most is held, as torch and transformers go through one.

`parts` counts the fewest tensors that a step needs; this counts those that are there: `LlamaForCausalLM` in eager mode
with fused attention, its cross entropy in float32, no dropout, states present (from the second step on), gradients
dropped after each step. One of these moments is the largest:

    loss       the loss goes backward: all activations, no gradient yet
    head       the head: all activations, the head's gradient
    norm       the last norm: all activations, its temporaries in float32
    last       the last block: all activations, temporaries of its MLP
    first      the first block: its own activations and temporaries, the gradients of all others
    input      the first norm: its temporaries, all gradients but the embedding's
    embedding  all gradients, and what its backward pass adds up
    step       the optimizer's: all gradients and its temporaries, no activations

In between activations go as gradients come, evenly, so that no moment in between is larger. What is kept a token and
block, in bytes, for elements of e bytes (h hidden, w all heads, k all key heads, f inside the MLP, a heads):

    norm, twice  4 h  its input in float32      e h  its output       e h  before its weight, where that trains
    attention    e (2 w + 2 k)  q, k, v, output          4 a  logarithms of sums
    MLP          4 e f  gate, silu(gate), up, product    e r a matrix with an adapter of rank r

Qwen 3 norms queries and keys besides: 4 (w + k), e (w + k). GPT-2's blocks are counted as `parts` does, with
room for a gradient of what is inside the MLP.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from refopt.memory.kinds import Chosen, apart, chief
from refopt.memory.parts import Bytes, adapters, state_of, train
from refopt.memory.scratch import scratch
from refopt.models import Model, Shape

BLAS = 2 * 2**25
"""Workspaces of cuBLAS that torch allocates on Hopper: one for the forward pass, one for the backward pass's thread.
Elsewhere torch takes 8,519,680 bytes each."""
SORTED = 3072
"""Tokens above which torch's embedding sorts them and adds up in float32 beside its gradient."""
LOGITS = 12
"""Bytes a logit where the loss goes backward: its logarithm, the gradient of that, and its own, in float32."""
NORM = 24
"""Bytes an element of a norm's input where it goes backward: six tensors of float32."""
BEFORE = ("loss", "embedding")
"""Moments at which no gradient that is released is being stepped with: there is none yet, or the last is still added
up."""
LARGE, STEP, SPLIT = 10 * 2**20, 2 * 2**20, 2**20
"""torch's allocator takes tensors from LARGE on by the STEP, and leaves them a rest of SPLIT or less."""


class Held(NamedTuple):
    """Bytes of a step's tokens: kept in all blocks, in one block, beside it while its MLP goes backward, as one block's
    input, at the end of the model, in a norm that goes backward, and in logits of a byte each."""

    kept: int
    block: int
    beside: int
    passed: int
    tail: int
    norm: int
    logits: int


def held(model: Model, each: int, batch: int, sequence: int, setup: Any) -> Held:
    """What the tokens of a step keep, for elements of `each` bytes."""
    count, lora, h = batch * sequence, setup.get("lora", 0), model.hidden
    tail = 4 * h + 4 + (0 if lora else 2 * each * h)
    block = count * (_block(model, each, lora) if model.gated else 34 * h)
    if not setup.get("flash", True):
        block += (each + 4) * model.heads * sequence * count
    kept, passed, shared = model.layers * block, count * each * h, 0
    if setup.get("checkpoint"):
        shared = 4 * h * count if model.gated and each == 4 else 0  # the first norm's input is the block's
        kept = model.layers * passed + block - shared
    elif lora and model.gated and kept:
        kept -= 4 * h * count  # no gradient goes to the embedding: the first norm's input is not kept
    beside = count * each * (2 * model.ffn + h)
    return Held(kept, block - shared, beside, passed, count * tail, count * NORM * h, count * model.vocab)


def _block(model: Model, each: int, lora: int) -> int:
    """What a token keeps in a block of the Llama family."""
    h = model.hidden
    wide = next((shape[0] for name, shape in model.tensors if name.endswith(".q")), h)
    norm = 4 * h + 4 + each * h * (1 if lora else 2)
    if any(name.endswith(".q_norm") for name, _ in model.tensors):  # Qwen 3 norms each head, before its rotation
        norm += ((4 + (0 if lora else each)) * (wide + model.kv) + 4 * 2 * model.heads) // 2
    adapted = each * lora * len(model.linears()) // max(1, model.layers)
    return 2 * norm + each * (2 * wide + 2 * model.kv + 4 * model.ffn) + 4 * model.heads + adapted


class Ends(NamedTuple):
    """Gradients in elements: all, the head's (with the last norm's), the embedding's, if it is a tensor of its own, and
    those of the first block that come after its MLP has gone backward."""

    size: int
    head: int
    table: int
    first: int


def ends(model: Model, lora: int) -> Ends:
    """Which gradients come when."""
    shapes = adapters(model, lora) if lora else model.shapes
    size, words = sum(map(math.prod, shapes)), 0 if lora else model.vocab * model.hidden
    if lora:
        block, down = size // max(1, model.layers), lora * (model.hidden + model.ffn)
    else:
        block, down = _weights(model), model.hidden * model.ffn
    return Ends(size, words and words + model.hidden, 0 if tied(model) else words, max(0, block - down))


def _weights(model: Model) -> int:
    """Elements of one block."""
    return sum(math.prod(shape) for name, shape in model.tensors if name.startswith("0."))


def tied(model: Model) -> bool:
    """Whether the head is the embedding's table."""
    return all(name != "lm_head" for name, _ in model.tensors)


def moments(
    model: Model,
    opt: Chosen,
    *,
    batch: int,
    sequence: int,
    blas: int = BLAS,
    activation_bytes: int | None = None,
    **setup: Any,
) -> dict[str, Bytes]:
    """What one device holds at each moment. Arguments and errors as of `train`.

    - blas: bytes of cuBLAS's workspaces, which count as scratch, as what the allocator leaves unused does
    - activation_bytes: of one element, 2 or 4; as the visible weights by default (adapters of float32 may train beside
      bfloat16 activations)
    """
    if activation_bytes not in (None, 2, 4):
        raise ValueError(f"memory.moments: activation_bytes must be 2 or 4, got {activation_bytes!r}")
    if not isinstance(model, Model):
        raise TypeError("memory.peak: a Model is needed, which says what its blocks are; got shapes")
    whole = train(model, opt, batch=batch, sequence=sequence, **setup)
    lora, each, release = setup.get("lora", 0), chief(opt)._visible_bytes(1), bool(setup.get("release"))
    shared = setup.get("ranks", 1) > 1
    wide = activation_bytes or each
    t, g = held(model, wide, batch, sequence, setup), ends(model, lora)
    temporaries = scratch(opt, adapters(model, lora) if lora else model, release or shared)
    together = _gathered_states(opt, model, each) if shared and not lora else 0
    rests = 0 if lora or shared else rounded(opt, model, each)
    always = whole._replace(gradients=0, activations=0, scratch=whole.scratch - temporaries + blas + rests)
    passing = always._replace(scratch=always.scratch + _gathered(model, each, setup))
    stepping = passing._replace(scratch=passing.scratch + release * temporaries)
    live = t.block if setup.get("checkpoint") else 0
    above = t.kept - live
    found = {
        "loss": (above + t.tail + LOGITS * t.logits, 0),
        "head": (above + t.tail + t.passed + wide * t.logits, g.head),
        "norm": (above + t.norm, g.head),
        "last": (t.kept + t.beside, g.head),
        "first": (t.block + t.passed + t.beside, g.size - g.table - g.first),
        "input": (t.norm + t.passed * (2 if live and wide == 2 else 1), g.size - g.table),
        "embedding": (t.passed + _summed(model, each, batch * sequence), g.size),
    }
    for name in ("input", "embedding") if lora else ():  # nothing before the first adapter goes backward
        del found[name]
    out = {
        n: (passing if n in BEFORE else stepping)._replace(
            activations=a, gradients=_come(whole.gradients, count, g.size, each, setup)
        )
        for n, (a, count) in found.items()
    }
    return out | {"step": always._replace(gradients=whole.gradients, scratch=always.scratch + temporaries + together)}


def rounded(opt: Chosen, model: Model | Sequence[Shape], each: int) -> int:
    """What torch's allocator leaves unused beside weights of `each` bytes and states without scales on the device."""
    out = 0
    for one, shapes in apart(opt, model):
        for shape, count in Counter(shapes).items():
            size = math.prod(shape)
            sizes = [each * size]
            if one.place.stem == "resident":
                sizes += [kept for kept in state_of(one, shape).values() if size and kept % size == 0]
            rests = [-x % STEP for x in sizes if x >= LARGE]
            out += count * sum(rest for rest in rests if rest <= SPLIT)
    return out


def _gathered_states(opt: Chosen, model: Model, each: int) -> int:
    """Bytes of the largest tensor with its gradient and states, where a rule that sees whole tensors steps shards."""
    whole = [(one, set(shapes)) for one, shapes in apart(opt, model) if one.rule.scope != "element"]
    sizes = [2 * each * math.prod(s) + sum(state_of(one, s).values()) for one, shapes in whole for s in shapes]
    return max(sizes, default=0)


def _come(total: int, count: int, size: int, each: int, setup: Any) -> int:
    """Bytes of the gradients of `count` elements of `size`, all of which take `total`."""
    if setup.get("release"):
        return min(total, each * count)
    return total * count // size if size else 0


def _summed(model: Model, each: int, count: int) -> int:
    """What the embedding's backward pass makes beside its gradient: where the head has the same table, the head's and
    the sum of both; sums in float32 where tokens are sorted."""
    again = 2 * each * model.vocab * model.hidden if tied(model) else 0
    return again + (4 * model.hidden * (count // 10 + min(count, model.vocab)) if count > SORTED else 0)


def _gathered(model: Model, each: int, setup: Any) -> int:
    """Whole tensors that ZeRO 3 puts together: weights of two blocks and gradients of one, and both of what is outside
    of blocks, as FSDP2 does where each block is a group."""
    if setup.get("ranks", 1) == 1 or setup.get("stage", 1) < 3 or setup.get("lora"):
        return 0
    block = _weights(model)
    return each * (3 * block + 2 * (model.size - model.layers * block))


def peak(model: Model, opt: Chosen, *, batch: int, sequence: int, **setup: Any) -> Bytes:
    """The largest of the `moments` of a step; what `train` adds up is never all there at once.

    >>> from refopt import Optimizer, memory, models
    >>> opt, setup = Optimizer("adamw", {"p": "bf16"}), {"lora": 64, "base": "double", "checkpoint": True}
    >>> for name in ("llama-2-7b", "llama-2-13b"):
    ...     need = memory.peak(models.named(name), opt, batch=1, sequence=512, **setup)
    ...     print(f"{name} {need.total / memory.GB:.3f} GB")
    llama-2-7b 6.052 GB
    llama-2-13b 10.553 GB
    """
    return max(moments(model, opt, batch=batch, sequence=sequence, **setup).values(), key=lambda m: m.total)
