"""Sharded parameters: all that is known here of DTensor, FSDP2 and checkpoints that other numbers of ranks load.

A DTensor is stepped through the tensor that lies on this rank, and its states are DTensors with its mesh and
placements. Which states are coded is decided by the shape of the whole, and blocks lie along the last dimension, so
that no cut along another one splits a block: every rank keeps the bytes that one rank alone would keep of its rows.
Where rows are cut, too (2-D, tensor parallel), states are coded if the parts are equal and of whole blocks.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch

from refopt.spec import ShapeError
from refopt_cuda.optim.settings import coding, eligible

here: Callable[[Any], torch.Tensor] = attrgetter("_local_tensor")
"""The tensor of a DTensor on this rank: what `to_local()` gives without autograd, in a fraction of its time."""
spec_of: Callable[[Any], Any] = attrgetter("_spec")
plainly = torch._C.DisableTorchFunctionSubclass
"""Within it, attributes of DTensors are read as those of tensors; torch looks for an override in each of them else."""
INITIAL = "_init_optim_state"
"""torch's function that steps an optimizer with zero gradients, so that there are states to load into."""
DEEP = 12
ROW = 16
"""Elements of the shortest rows that are blocked by themselves."""


def is_sharded(x: Any) -> bool:
    """Whether `x` is a DTensor; no module is imported for the question."""
    return hasattr(x, "_local_tensor")


def local(x: torch.Tensor) -> torch.Tensor:
    """What lies on this rank: a tensor itself, or a DTensor's part of it, without autograd."""
    return getattr(x, "_local_tensor", x)


def locals_of(params: Sequence[torch.Tensor]) -> Callable[[Iterable[torch.Tensor]], list[torch.Tensor]] | None:
    """How lists of tensors that are sharded like these are unwrapped; None where none is sharded."""
    count = sum(map(is_sharded, params))
    if not count:
        return None
    unwrap = here if count == len(params) else local
    return lambda xs: [*map(unwrap, xs)]


def specs(grads: Iterable[torch.Tensor]) -> list[Any]:
    """Mesh, placements and shape of each gradient that is sharded; FSDP's are the same objects in every step."""
    try:
        return [*map(spec_of, grads)]
    except AttributeError:
        return [getattr(g, "_spec", None) for g in grads]


def gradients(
    params: Sequence[Any], noted: Sequence[Any], parts: Sequence[torch.Tensor], specs: Sequence[Any]
) -> list[torch.Tensor] | None:
    """This rank's parts of the gradients of DTensors, in one pass.

    None where a parameter or its part is not the one noted, or a gradient has not the very mesh and placements noted.
    """
    rows = zip(params, noted, parts, specs, strict=False)
    try:
        with plainly():
            out = [
                g._local_tensor for p, q, x, s in rows if p is q and p._local_tensor is x and (g := p.grad)._spec is s
            ]
    except AttributeError:  # there is no gradient, or it is no DTensor
        return None
    return out if len(out) == len(params) == len(noted) else None


def placed(p: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape of this rank's part of a DTensor, and where it begins in each dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset as compute

    shape, offset = compute(p.shape, p.device_mesh, p.placements)
    return tuple(shape), tuple(offset) or (0,) * p.ndim


def first(p: torch.Tensor, call: str) -> int:
    """The number of this rank's first element in the whole, which its random bits are counted from.

    ValueError where its elements do not follow one another there.
    """
    if not is_sharded(p) or not local(p).numel():
        return 0
    shape, offset = placed(p)
    cut = next((d for d, n in enumerate(shape) if n != 1), p.ndim)
    if any(n != whole for n, whole in zip(shape[cut + 1 :], p.shape[cut + 1 :], strict=True)):
        raise ValueError(
            f"{call}: random bits go by an element's number, and those of this rank's part of {tuple(p.shape)} do not "
            f"follow one another; shard dimension 0, or take another format of weights, got {_placements(p)}"
        )
    return sum(a * s for a, s in zip(offset, _strides(p.shape), strict=True))


def _last(p: torch.Tensor) -> int:
    """Into how many parts the last dimension is cut."""
    if not is_sharded(p):
        return 1
    cuts = zip(p.placements, p.device_mesh.shape, strict=True)  # type: ignore[attr-defined]
    return math.prod(n for q, n in cuts if _dim(q, p.ndim) == p.ndim - 1)


def whole_blocks(p: torch.Tensor, group: Mapping[str, Any]) -> bool:
    """Whether sharding leaves every block on one rank: rows are not cut, or into equal parts of whole blocks; never
    those of a vector."""
    parts = _last(p)
    if parts == 1 or p.ndim < 2:
        return parts == 1
    blocks = _blocks(group)
    return p.shape[-1] >= parts * ROW and all(p.shape[-1] % (parts * block) == 0 for block in blocks or [1])


def _blocks(group: Mapping[str, Any]) -> list[int]:
    """Elements that share a scale, of each state that this group codes in blocks."""
    found = [coding(text, group["block"], False) for role, text in group["codecs"].items() if role != "p"]
    return [c.block for c in found if c.form.scaled]


def say_uncoded(p: torch.Tensor, group: Mapping[str, Any], call: str) -> None:
    """A warning where states of `p` would be coded, were its blocks not cut."""
    if _blocks(group) and not whole_blocks(p, group) and eligible(p, group["min_size"]):
        warnings.warn(
            f"{call}: a parameter of shape {tuple(p.shape)} is sharded along its last dimension, "
            f"{_placements(p)}, where blocks would be cut: its states are kept in float32. Parts of whole blocks, "
            f"multiples of {max(_blocks(group))} elements, are coded",
            stacklevel=5,
        )


def check(p: torch.Tensor, call: str) -> None:
    """ValueError for placements that no step can go by: sums that are not taken yet."""
    if is_sharded(p) and any(q.is_partial() for q in p.placements):  # type: ignore[attr-defined]
        raise ValueError(f"{call}: a parameter's placements must be shards or replicas, got {_placements(p)}")


def refuse_early(params: Iterable[torch.Tensor], call: str) -> None:
    """ValueError for a sharded parameter that backward should step: its gradient arrives on streams of FSDP's own."""
    for p in filter(is_sharded, params):
        raise ValueError(
            f"{call}: during_backward is of parameters that are not sharded, got one of shape {tuple(p.shape)} on "
            f"{_placements(p)}; place='paged' without it steps shards"
        )


def refuse_place(p: torch.Tensor, home: Any, call: str) -> None:
    """ValueError for a sharded parameter in a place whose class does not say of itself that it keeps shards."""
    if is_sharded(p) and not vars(type(home)).get("shards", False):
        raise ValueError(
            f"{call}: this place does not keep states of sharded parameters (place='resident', 'paged', 'host' and "
            f"'disk' do), got a parameter of shape {tuple(p.shape)} on {_placements(p)}"
        )


def gradient(p: torch.Tensor, g: torch.Tensor, call: str) -> torch.Tensor:
    """This rank's part of a gradient, brought to the placements of its parameter.

    ValueError where one of the two is a DTensor and the other is not, or on another mesh; ShapeError where its part
    has not the shape of the parameter's.
    """
    mine = local(agree(p, g, call))
    if mine.shape != local(p).shape:
        raise ShapeError(
            f"{call}: this rank's part of a gradient has shape {tuple(mine.shape)}, that of its parameter has "
            f"{tuple(local(p).shape)}"
        )
    return mine


def agree(p: torch.Tensor, g: torch.Tensor, call: str) -> torch.Tensor:
    """A gradient with the placements of its parameter; ValueError as `gradient`."""
    if is_sharded(p) != is_sharded(g):
        kinds = ["a DTensor" if is_sharded(x) else "a plain tensor" for x in (g, p)]
        raise ValueError(f"{call}: a gradient of shape {tuple(g.shape)} is {kinds[0]}, its parameter is {kinds[1]}")
    if not is_sharded(p):
        return g
    ours, theirs = p._spec, g._spec  # type: ignore[attr-defined]
    if theirs is ours or (theirs.mesh == ours.mesh and theirs.placements == ours.placements):
        return g
    if theirs.mesh != ours.mesh:
        raise ValueError(f"{call}: a gradient lies on {theirs.mesh}, its parameter on {ours.mesh}")
    out = g.redistribute(placements=ours.placements)  # type: ignore[attr-defined]
    _waited(here(out))
    return out


def whole(x: torch.Tensor) -> torch.Tensor:
    """The values of all ranks together, where this rank's part lies; a plain tensor is whole."""
    return _waited(x.full_tensor()).to(here(x).device) if is_sharded(x) else x  # type: ignore[attr-defined]


def filled(x: torch.Tensor, value: float) -> torch.Tensor:
    """The same tensor, this rank's part of it filled with one number."""
    local(x).fill_(value)
    return x


def empty(shape: tuple[int, ...], dtype: torch.dtype, p: torch.Tensor) -> torch.Tensor:
    """Memory for a state of `p`, where `p` lies: sharded as `p` is where it has its rows, else whole.

    shape    that of the whole
    """
    return as_part(torch.empty(part_shape(shape, p), dtype=dtype, device=local(p).device), shape, p)


def part_shape(shape: tuple[int, ...], p: torch.Tensor) -> tuple[int, ...]:
    """The shape of what a rank keeps of a state of `p` that has this shape as a whole."""
    if not _cut(shape, p):
        return shape
    mine = tuple(here(p).shape)
    return mine if shape == tuple(p.shape) else (*mine[:-1], shape[-1] // _last(p))


def as_part(x: torch.Tensor, shape: tuple[int, ...], p: torch.Tensor) -> torch.Tensor:
    """`x`, wherever it lies, as this rank's part of a state of `p`: a DTensor of this whole shape, or itself."""
    return _wrap(x, shape, p) if _cut(shape, p) else x


def _cut(shape: tuple[int, ...], p: torch.Tensor) -> bool:
    """Whether a state of `p` with this shape is sharded as `p` is: where it has its rows, and what is cut of them is
    cut into equal parts."""
    if not is_sharded(p) or shape == tuple(p.shape):
        return is_sharded(p)
    parts = _last(p)
    rows = len(shape) == p.ndim >= (1 if parts == 1 else 2) and shape[:-1] == p.shape[:-1]
    return rows and (parts == 1 or (p.shape[-1] % parts == 0 and shape[-1] % parts == 0))


def fits(x: torch.Tensor, p: torch.Tensor) -> bool:
    """Whether a state tensor is sharded as its parameter is, and its part row-major."""
    if is_sharded(x) != is_sharded(p):
        return False
    if is_sharded(p) and (x.device_mesh != p.device_mesh or x.placements != p.placements):  # type: ignore[attr-defined]
        return False
    return local(x).is_contiguous()


def fill(out: torch.Tensor, have: torch.Tensor) -> torch.Tensor:
    """Copy a saved tensor of the same global shape into `out`, whichever of the two is sharded, and how."""
    if is_sharded(have):
        if not is_sharded(out) or have.device_mesh != out.device_mesh:  # type: ignore[attr-defined]
            have = whole(have)
        else:
            have = _waited(here(have.redistribute(placements=out.placements)))  # type: ignore[attr-defined]
    if is_sharded(out) and have.shape != here(out).shape:
        shape, offset = placed(out)
        have = have[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))]
    local(out).copy_(have)
    return out


def initial() -> bool:
    """Whether this step is torch's own, taken for states to load into: it shall make them, and change nothing."""
    frame = sys._getframe(1)
    for _ in range(DEEP):
        if frame is None or frame.f_code.co_name == INITIAL:
            return frame is not None
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _wrap(x: torch.Tensor, shape: tuple[int, ...], p: Any) -> torch.Tensor:
    """A DTensor of this part with the mesh and placements of `p`; from_local would move it to the mesh's device."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), _strides(shape), x.dtype)
    return DTensor(x, DTensorSpec(p.device_mesh, tuple(p.placements), tensor_meta=meta), requires_grad=False)


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Of a row-major tensor."""
    out = [1]
    for n in reversed(shape[1:]):
        out.append(out[-1] * max(n, 1))
    return tuple(reversed(out)) if shape else ()


def _dim(placement: Any, ndim: int) -> int | None:
    dim = getattr(placement, "dim", None)
    return None if dim is None else dim % max(ndim, 1)


def _placements(p: Any) -> str:
    return ", ".join(map(str, p.placements))


def _waited(x: Any) -> torch.Tensor:
    """A tensor whose communication is done."""
    return x.wait() if hasattr(x, "wait") else x
