"""Partition: which rank owns which blocks (ZeRO 1 to 3, Rajbhandari et al., arXiv 1910.02054). It changes no bit.

The tensors are laid end to end in parameter order, and the line is padded to N stretches of S elements, S a multiple of
the largest block. Rank k owns the blocks that *begin* in [kS, (k+1)S): a block is never split, so no scale is shared
and a state that is gathered and cut again, for any other N, is the same bytes. A tensor that a step must see whole (a
sum over rows, a scale for all) belongs to the rank in whose stretch it begins.

Stage 1 shares out the states, 2 the gradients too, 3 the weights too. In every stage a rank steps its own blocks
alone, in any place: resident, paged, on the host, on disk.

>>> import numpy as np
>>> from refopt import Optimizer, Partition
>>> opt, p = Optimizer("lion", "dynamic8"), [np.ones(300, np.float32), np.ones((2, 500), np.float32)]
>>> part = Partition(opt, p, ranks=2, stage=2)
>>> part.stretch, part.windows
(768, [[(0, 0, 300), (1, 0, 500)], [(1, 500, 1000)]])
>>> for move in part.traffic():
...     print(*move)
g reduce-scatter 5200
p all-gather 5200
>>> whole, state = opt.step(p, p, opt.init(p))
>>> shared, shards = part.step(p, p, part.scatter(opt.init(p)))
>>> all((a == b).all() for a, b in zip(whole, shared))
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from refopt import codecs as _codecs
from refopt.assign import called
from refopt.cells import Share, cut, differ, shelf, stretch_bytes
from refopt.spec import Array, Box, Codec, Move, ShapeError, StateError
from refopt.step import Optimizer
from refopt.trees import Params, leaves, rebuild

Shard = list[dict[str, Any]]
"""What one rank keeps: for each of its stretches `tensor`, `window` (shape, first, past last), `t` and the states."""


class Partition:
    """The shares of N ranks in the tensors of one model, and the step of each rank on its own share.

    `windows[rank]` lists (tensor, first, past last element), in order. All ranks live in this process, so `step` is the
    whole of what N processes would do; `step_rank` is what one of them does between its two exchanges.
    """

    def __init__(self, opt: Optimizer, params: Params, ranks: int, stage: int = 1) -> None:
        if isinstance(ranks, bool) or not isinstance(ranks, int | np.integer) or ranks < 1:
            raise ValueError(f"Partition: ranks must be whole and >= 1, got {ranks!r}")
        if stage not in (1, 2, 3) or isinstance(stage, bool):
            raise ValueError(f"Partition: stage must be 1, 2 or 3, got {stage!r}")
        self.opt, self.ranks, self.stage = opt, int(ranks), stage
        self.shapes = [p.shape for p in leaves("Partition", "params", params)]
        self.size = sum(math.prod(shape) for shape in self.shapes)
        self.stretch = max(-(-self.size // (self.ranks * opt.block)), 1) * opt.block
        self.windows = self._windows()

    @property
    def padding(self) -> int:
        """Elements that the line of tensors is padded by."""
        return self.ranks * self.stretch - self.size

    def split(self, name: str, tree: Params, like: Params = None) -> list[list[Any]]:
        """Every rank's stretches of the arrays of a tree, flat; a gradient of None stays None.

        Raises TypeError for arrays that are not float32, ShapeError for those that this partition was not made for.
        """
        arrays = self._leaves("split", name, tree, like)
        return [[_stretch(arrays[k], a, b) for k, a, b in mine] for mine in self.windows]

    def join(self, shares: Sequence[Sequence[Array]], like: Params = None) -> Params:
        """The arrays that `split` took apart, as a list, or as the tree that `like` is."""
        found: list[list[Array]] = [[] for _ in self.shapes]
        for mine, share in zip(self.windows, shares, strict=True):
            for (k, _, _), part in zip(mine, share, strict=True):
                found[k].append(part)
        whole = [np.concatenate(parts).reshape(shape) for parts, shape in zip(found, self.shapes, strict=True)]
        return whole if like is None else rebuild(like, whole)

    def scatter(self, state: list[dict[str, Any]]) -> list[Shard]:
        """Every rank's share of a whole state."""
        return [[self._share(state[k], k, a, b) for k, a, b in mine] for mine in self.windows]

    def gather(self, shards: Sequence[Shard]) -> list[dict[str, Any]]:
        """The whole state, as an Optimizer without ranks has it, or as another Partition scatters it."""
        self._check("gather", shards)
        held: list[list[dict[str, Any]]] = [[] for _ in self.shapes]
        for share in (share for shard in shards for share in shard):
            held[share["tensor"]].append(share)
        return [self._whole(k, shares) for k, shares in enumerate(held)]

    def step(self, params: Params, grads: Params, shards: Sequence[Shard], **now: Any) -> tuple[Params, list[Shard]]:
        """One step of every rank; `grads` are already reduced. Everything is checked before anything is computed."""
        opt = self.opt
        hyper = opt.rule.check("step", opt.hyper | opt._translate(now)) if now else opt.hyper
        self._check("step", shards)
        weights, whole = self._leaves("step", "params", params), self._leaves("step", "grads", grads, params)
        usable = [opt._usable(f"step: grads[{k}]", g) for k, g in enumerate(whole)]
        ps, gs = self.split("params", weights), self.split("grads", usable)
        waiting = self.gather(shards) if opt.max_norm is not None else []
        now_due = [opt.due(g, s)[0] for g, s in zip(usable, waiting, strict=False)]
        opt = opt.clipped(now_due)
        with shelf(opt.place) as make:
            done = [self._step_rank(p, g, shard, hyper, make, opt) for p, g, shard in zip(ps, gs, shards, strict=True)]
        return self.join([p for p, _ in done], params), [shard for _, shard in done]

    def finish(self, params: Params, shards: Sequence[Shard], **now: Any) -> tuple[Params, list[Shard]]:
        """Apply the gradients that are pending, if any."""
        return self.step(params, [None] * len(self.shapes), shards, **now)

    def step_rank(self, rank: int, p: list[Array], g: list[Any], shard: Shard, **now: Any) -> tuple[list[Array], Shard]:
        """What one rank computes from its own stretches of weights and gradients, and its own shard.

        Whether a gradient is finite is for all ranks to agree on first: pass None for one that is to be skipped.
        """
        opt = self.opt
        hyper = opt.rule.check("step", opt.hyper | opt._translate(now)) if now else opt.hyper
        self._check_shard("step_rank", rank, shard)
        if opt.max_norm is not None:
            raise ValueError("step_rank: max_norm is of the gradients of all ranks: agree on a gscale, or call step")
        with shelf(opt.place) as make:
            return self._step_rank(p, g, shard, hyper, make, opt)

    def traffic(self) -> list[Move]:
        """What a step exchanges, in bytes of the whole; in a ring each rank sends (N - 1) / N of them."""
        p, g = self.opt._visible_bytes(self.size), 4 * self.size
        gather, reduce = Move("p", "all-gather", p), Move("g", "reduce-scatter", g)
        return [gather, gather, reduce] if self.stage == 3 else [reduce, gather]

    def held(self, rank: int) -> dict[str, int]:
        """Bytes that a rank keeps of weights, gradients and states, by the records."""
        mine = sum(b - a for _, a, b in self.windows[rank])
        states = sum(sum(self._bytes(k, a, b).values()) for k, a, b in self.windows[rank])
        p, g = (mine if self.stage >= least else self.size for least in (3, 2))
        return {"p": self.opt._visible_bytes(p), "g": 4 * g, "states": states}

    def _leaves(self, call: str, name: str, tree: Params, like: Params = None) -> list[Any]:
        arrays = leaves(call, name, tree, like)
        if len(arrays) != len(self.shapes):
            raise ShapeError(f"{call}: {len(arrays)} {name}, this partition has {len(self.shapes)} tensors")
        for k, (a, shape) in enumerate(zip(arrays, self.shapes, strict=True)):
            if a is not None and a.shape != shape:
                raise ShapeError(f"{call}: {name}[{k}] has shape {a.shape}, params[{k}] has {shape}")
            if a is not None and a.dtype != np.float32:
                raise TypeError(f"{call}: {name}[{k}] must be float32, got {a.dtype}")
        return arrays

    def _windows(self) -> list[list[tuple[int, int, int]]]:
        out: list[list[tuple[int, int, int]]] = [[] for _ in range(self.ranks)]
        offset = 0
        for k, shape in enumerate(self.shapes):
            bounds = self.opt.bounds(shape)
            starts = bounds[:-1] if len(bounds) > 1 else bounds
            owners = np.minimum((offset + starts) // self.stretch, self.ranks - 1)
            for rank in np.unique(owners):
                i = np.flatnonzero(owners == rank)
                out[rank].append((k, int(bounds[i[0]]), int(bounds[min(i[-1] + 1, len(bounds) - 1)])))
            offset += math.prod(shape)
        return out

    def _forms(self, k: int) -> dict[str, tuple[int, ...]]:
        """The shape of everything in the state of tensor k that is cut along with it."""
        shape, further = self.shapes[k], {"p": self.shapes[k]} if len(self.opt.codecs["p"].parts) > 1 else {}
        return self.opt.rule.shapes(shape, self.opt.hyper) | further

    def _codec(self, role: str, k: int) -> Codec:
        return _codecs.f32 if role == "pending" else self.opt.codec_of(role, math.prod(self.shapes[k]))

    def _bytes(self, k: int, a: int, b: int) -> dict[str, int]:
        kinds = {s.name: s.dtype for s in self.opt.states}
        out = {}
        for role, form in self._forms(k).items():
            span = self.opt._span(math.prod(form), a, b)
            out[role] = stretch_bytes(self._codec(role, k), kinds.get(role, np.float32), form, *span)
        return out | ({"p": out["p"] - self.opt._visible_bytes(b - a)} if "p" in out else {})

    def _share(self, s: dict[str, Any], k: int, a: int, b: int) -> dict[str, Any]:
        forms = self._forms(k) | {"pending": self.shapes[k]}
        out = {"tensor": k, "window": (self.shapes[k], a, b), "t": s["t"]}
        for role in s.keys() - {"t"}:
            codec, span = self._codec(role, k), self.opt._span(math.prod(forms[role]), a, b)
            at = cut(codec, forms[role], codec.bounds(forms[role]), *span)
            arrays = s[role].arrays if isinstance(s[role], Box) else {"codes": s[role]}
            out[role] = Share(codec, {n: np.array(x.reshape(-1)[at[n]]) for n, x in arrays.items()})
        return out

    def _whole(self, k: int, shares: list[dict[str, Any]]) -> dict[str, Any]:
        first, forms = shares[0], self._forms(k) | {"pending": self.shapes[k]}
        out = {"t": first["t"]}
        for role in (role for role in first if role not in ("tensor", "window", "t")):
            codec = first[role].codec
            names = first[role].arrays
            arrays = {n: np.concatenate([np.asarray(s[role].arrays[n]) for s in shares]) for n in names}
            plain = codec.stem == "f32"
            box = None if plain else Box(codec, forms[role], codec.shaped(forms[role], arrays))
            out[role] = arrays["codes"].reshape(forms[role]) if box is None else box
        return out

    def _check(self, call: str, shards: Sequence[Shard]) -> None:
        if len(shards) != self.ranks:
            raise StateError(
                f"{call}: {len(shards)} shards for {self.ranks} ranks: they were made by another partition"
            )
        for rank, shard in enumerate(shards):
            self._check_shard(call, rank, shard)
        steps: dict[int, set[int]] = {}
        for share in (share for shard in shards for share in shard):
            steps.setdefault(share["tensor"], set()).add(share["t"])
        for k, found in steps.items():
            if len(found) > 1:
                raise StateError(f"{call}: the ranks' shares of tensor {k} are of steps {sorted(found)}")

    def _check_shard(self, call: str, rank: int, shard: Shard) -> None:
        mine = self.windows[rank]
        if [(s.get("tensor"), s.get("window")) for s in shard] != [(k, (self.shapes[k], a, b)) for k, a, b in mine]:
            raise StateError(f"{call}: the shard of rank {rank} was made by another partition")
        for (k, a, b), share in zip(mine, shard, strict=True):
            for role, size in self._bytes(k, a, b).items():
                want, have = self._codec(role, k), share.get(role)
                if not isinstance(have, Share) or differ(have.codec, want) or have.nbytes != size:
                    made = "missing" if have is None else f"stored as {called(have.codec)} in {have.nbytes} bytes"
                    raise StateError(
                        f"{call}: rank {rank}'s {role!r} of tensor {k} is {made}, "
                        f"this optimizer has {called(want)} in {size}"
                    )

    def _step_rank(
        self, ps: list[Array], gs: list[Any], shard: Shard, hyper: dict[str, Any], make: Any, opt: Optimizer
    ) -> tuple[list[Array], Shard]:
        done = []
        for p, g, share in zip(ps, gs, shard, strict=True):
            named = {"tensor": share["tensor"], "window": share["window"]}
            state = {n: x for n, x in share.items() if n not in named}
            if isinstance(state.get("pending"), Share):
                state["pending"] = state["pending"].arrays["codes"]
            p, state = opt._apply(share["tensor"], p, g, state, hyper, make, share["window"])
            if "pending" in state:
                state["pending"] = Share(_codecs.f32, {"codes": state["pending"]})
            done.append((p, named | state))
        return [p for p, _ in done], [share for _, share in done]


def _stretch(array: Any, a: int, b: int) -> Any:
    return None if array is None else array.reshape(-1)[a:b].copy()
