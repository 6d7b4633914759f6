"""`place="disk"`: states in files, stepped as they pass through a few pages of host memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from refopt.spec import StateError
from refopt_cuda.optim import agreeing, filed, reopening, sharded, states
from refopt_cuda.optim.decks import Book, Deck, Round
from refopt_cuda.optim.paging import Paged
from refopt_cuda.optim.pieces import Page
from refopt_cuda.optim.run import Plan, Slot
from refopt_cuda.optim.watched import replace
from refopt_cuda.places.disk import BUFFERS, Desk, Turn
from refopt_cuda.places.files import ALIGN
from refopt_cuda.places.lanes import OUT
from refopt_cuda.places.paged import Copy, joined
from refopt_cuda.places.records import Extent, Filed, Record, Source, gather
from refopt_cuda.places.slabs import up
from refopt_cuda.places.vault import Vault, named


class OnDisk(Paged):
    """Where an optimizer's states live: in files of the directory `path`.

    An entry of the optimizer's state holds tensors without memory ("meta"). Whoever looks at it is shown copies, in
    memory that is itself a file; the next step takes them away, or takes them over where they were changed. Of sharded
    parameters it is each rank's shards, in a directory of its own within `path`; these tensors are DTensors then.
    """

    rehearsal, shards = False, True
    """Whether pages of CPU parameters pass through a ring as those of a GPU do; whether it takes sharded parameters."""

    def __init__(self, page_bytes: int | None, path: Path, keep_weights: bool) -> None:
        super().__init__(page_bytes, 0)
        self.keep_weights = keep_weights
        self.path, self.folder, self.given, self.lost, self.turned = path, path, False, "", 0
        self.vault: Vault | None = None
        self.metas: Any = WeakTensorKeyDictionary()
        self.sources: Any = WeakTensorKeyDictionary()
        self.shown: Any = WeakTensorKeyDictionary()
        self.records: Any = WeakKeyDictionary()
        self.weights: Any = WeakKeyDictionary()
        self.desks: dict[torch.device, Desk] = {}

    # ---------------------------------------------------------------------------------------------------------- entries

    def ready(self, kept: states.Layout, have: dict[str, Any] | None, p: torch.Tensor, call: str) -> dict[str, Any]:
        """As `states.ready`, without memory; a state that somebody has changed or replaced is where its words come
        from."""
        if not filed.in_files(kept, p):
            return states.ready(kept, have, p, call)
        if have is None or not states.begun(kept, have):
            return {"step": 0, **self._entry(p, {part.key: filed.constant(part) for part in kept.all}, kept)}
        where = f"{call}: the state of a parameter of shape {tuple(p.shape)}"
        states.check(kept, kept, have, where)
        mine = {key for key in kept.keys if self.metas.get(p, {}).get(key) is have[key]}
        for part in kept.all:
            if part.key in mine and have[part.key].dtype != part.dtype:
                raise StateError(f"{where}: {part.key!r} is {have[part.key].dtype}, it must be {part.dtype}")
        if mine == set(kept.keys) and type(have.get("step")) is int:
            return have
        self.given = True
        theirs = {part.key: filed.dense(have, part, p) for part in kept.all if part.key not in mine}
        return {"step": states.count(have, where), **self._entry(p, {**self.sources.get(p, {}), **theirs}, kept)}

    def _entry(self, p: torch.Tensor, sources: Mapping[str, Source], kept: states.Layout) -> dict[str, torch.Tensor]:
        """Tensors without memory for these sources."""
        parts = [part for part in kept.all if part.key in sources]
        self.sources[p] = {part.key: sources[part.key] for part in parts}
        self.metas[p] = {part.key: filed.meta(part, p) for part in parts}
        return dict(self.metas[p])

    def restore(
        self, known: states.Layout, saved: Mapping[str, Any], p: torch.Tensor, have: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """As `states.restore`, into a file of its own, which the pages are made from when they are stepped."""
        if not filed.in_files(known, p):
            return states.restore(known, saved, p)
        self.given, self.lost = True, ""
        copy = states.restore(known, saved, p, self._make)
        found = {part.key: filed.dense(copy, part, p) for part in known.all if part.key in copy}
        return {"step": copy["step"], **self._entry(p, found, known)}

    def _make(self, part: states.Part, p: torch.Tensor) -> torch.Tensor:
        return sharded.as_part(self._scratch([filed.here(part, p)])[0], part.shape, p)

    def _scratch(self, parts: Sequence[states.Part]) -> list[torch.Tensor]:
        """Memory for so much that no host may hold it: a file without a name, which goes with the tensors."""
        starts, end = [], 0
        for part in parts:
            starts.append(end)
            end += up(part.bytes, 64)
        with named("place='disk'", self.folder, f"a copy of them takes {end:,} bytes"):
            self.folder.mkdir(parents=True, exist_ok=True)
            memory = np.frombuffer(filed.mapped(self.folder, end), np.uint8)
        cut = [memory[a : a + part.bytes] for a, part in zip(starts, parts, strict=True)]
        return [torch.from_numpy(x).view(part.dtype).view(part.shape) for x, part in zip(cut, parts, strict=True)]

    # ----------------------------------------------------------------------------------------------- looking at a state

    def show(self, state: Mapping[Any, Any]) -> None:
        """Put copies where tensors without memory are. RuntimeError where they are not those of one step."""
        if self.lost:
            raise RuntimeError(f"place='disk': {self.lost}")
        todo = [(p, entry, own) for p, entry in state.items() if (own := self._own(p, entry))]
        metas = [(key, x) for *_, own in todo for key, x in own.items()]
        parts = [states.Part(key, tuple(sharded.local(x).shape), x.dtype, 0) for key, x in metas]
        copies = iter(self._scratch(parts) if parts else [])
        shown = [
            (p, entry, own, {key: sharded.as_part(next(copies), tuple(x.shape), p) for key, x in own.items()})
            for p, entry, own in todo
        ]
        gather((self.sources[p][key], 0, filed.bytes_of(x)) for p, _, _, seen in shown for key, x in seen.items())
        for p, entry, own, seen in shown:
            replace(entry, seen)
            self.shown[p] = entry, {key: (x, own[key], _version(x)) for key, x in seen.items()}

    def begin(self, state: Mapping[Any, Any], params: Iterable[torch.Tensor], call: str) -> None:
        """Take the copies away that nobody has changed."""
        for p, (entry, seen) in self.shown.items():
            same = all(entry.get(key) is x and _version(x) == version for key, (x, _, version) in seen.items())
            if same and state.get(p) is entry:
                replace(entry, {key: meta for key, (_, meta, _) in seen.items()})
        self.shown.clear()
        self.turned = 0
        if self.vault is None:
            self.folder = agreeing.folder_of(self.path, params)
        if self.lost:
            raise RuntimeError(f"{call}: {self.lost}")

    def _own(self, p: torch.Tensor, entry: Any) -> dict[str, torch.Tensor]:
        """Of an entry, the tensors without memory that stand for the files."""
        metas = self.metas.get(p, {})
        return {key: x for key, x in entry.items() if isinstance(x, torch.Tensor) and metas.get(key) is x}

    # ------------------------------------------------------------------------------------------------------------ pages

    def holds(self, slot: Slot) -> bool:
        return filed.in_files(slot.kept, slot.p)

    def arrange(self, plan: Plan, call: str) -> None:
        if self.vault is not None:
            self.vault.check(call)
        super().arrange(plan, call)

    def _extend(self, deck: Deck, book: Book, slots: list[Slot], call: str) -> None:
        """Pages, and a data file for the new ones."""
        known = set(book.pages)
        super()._extend(deck, book, slots, call)
        new = [page for page in book.pages if page not in known]
        if not new:
            return
        self._open(call, deck.device.type == "cuda")
        assert self.vault is not None
        self.vault.wait()
        beside = new if self.keep_weights else []
        sizes = [(page.size, filed.what(page, "states")) for page in new]
        sizes += [(filed.weight_bytes(page), filed.what(page, "weights")) for page in beside]
        spans = [list(filed.spans(page)) for page in new] + [list(filed.weights(page)) for page in beside]
        records = self.vault.add(sizes, {"entries": dict(filed.about(slots)), "spans": spans}, call)
        self.weights.update(zip(beside, records[len(new) :], strict=True))
        self._file(new, records[: len(new)])

    def _file(self, new: Sequence[Page], records: Sequence[Record]) -> None:
        """Pages are where words are kept, from now on; what they hold first comes from where it was."""
        extents: dict[tuple[Slot, str], list[Extent]] = {}
        for page, record in zip(new, records, strict=True):
            self.records[page] = record
            record.sources = [(at, n, self.sources[s.p][key], start) for s, key, start, n, at in filed.cuts(page)]
            for slot, key, start, n, at in filed.cuts(page):
                extents.setdefault((slot, key), []).append(Extent(start, n, record, at))
        for (slot, key), found in extents.items():
            self.sources[slot.p][key] = Filed(found)

    def _open(self, call: str, gpu: bool) -> None:
        if self.vault is None:
            self.vault = Vault(self.folder, call, replace=self.given, stays=self.keep_weights, gpu=gpu)

    def room(self, deck: Deck, book: Book, call: str) -> None:
        """Pages of host memory, and where there is a GPU a ring on it."""
        through = deck.device.type == "cuda" or self.rehearsal
        records = [(self.records[page], self.weights.get(page)) for page in book.pages]
        size = max((a.room + (b.room if b else 0) for a, b in records), default=0)
        desk = self.desks.get(deck.device)
        if desk is None or desk.size < size:
            assert self.vault is not None
            whole = deck.slabs.take(BUFFERS * size + ALIGN)
            start = -whole.ctypes.data % ALIGN
            cut = [whole[start + k * size : start + (k + 1) * size] for k in range(BUFFERS)]
            self.desks[deck.device] = Desk(cut, self.vault.pool, deck.lanes.meet, 1 if through else 0)
        if through:
            with deck.current:
                deck.widen(book.pages, ALIGN)
                deck.slabs.pin(call)

    def turn(self, book: Book, now: Round) -> None:
        """Step these parameters, page by page."""
        through = now.deck.device.type == "cuda" or self.rehearsal
        if through:
            now.rebind(book)
        now.take(book.slots if self.keep_weights else now.works)
        turns = []
        for page in book.pages:
            step = self.stepping(page, now)
            if step is not None:
                give = partial(self._step, now.deck, page, step, through)
                turns.append(Turn(self.records[page], give, self.weights.get(page)))
        self._run(now.deck, turns)
        now.put()

    def _step(self, deck: Deck, page: Page, step: Any, through: bool, buffer: np.ndarray) -> Any:
        """Step a page that lies in a buffer; returns the event of its return."""
        self.turned += 1
        if through:
            deck.ring.turn(page.number, joined([Copy(0, buffer.ctypes.data, page.size)]), step)
        else:
            page.bind(torch.from_numpy(buffer))
            step()
        if page in self.weights:
            behind = buffer.ctypes.data + self.records[page].room
            beside = [Copy(at, x.dense.data_ptr(), x.dense.nbytes) for x, at in filed.beside(page)]
            for offset, address, size in beside:
                for there, here, some in joined([Copy(0, behind + offset, size)]):
                    deck.lanes.copy(OUT, here, address + there, some)
            if through:
                deck.lanes.record(OUT, deck.ring.place(page.number).stored)
        return deck.ring.place(page.number).stored if through else None

    def _run(self, deck: Deck, turns: Sequence[Turn]) -> None:
        assert self.vault is not None
        try:
            self.desks[deck.device].run(turns, self.vault.wait)
        except BaseException as error:
            deck.lanes.finish()
            if self.turned:
                self._lose(error)
            raise

    def _lose(self, error: BaseException) -> None:
        """Some weights are a step ahead of their states now."""
        if not self.lost:
            self.lost = (
                f"the step before ended early ({error or type(error).__name__}): some weights were stepped and their "
                "states are lost. Load a checkpoint, or resume() with the weights of the last complete step"
            )
            error.add_note(f"{self.turned} pages had been stepped: {self.lost}")

    def stepped(self, plans: Iterable[Plan], state: Mapping[Any, Any], numbers: Mapping[int, int], rule: str) -> None:
        """A step of all groups is complete: stamp it when its pages are written."""
        if not self.turned or self.vault is None:
            return
        steps = {numbers[id(p)]: int(entry["step"]) for p, entry in state.items() if id(p) in numbers}
        every = [(numbers[id(p)], s) for p, found in self.sources.items() if id(p) in numbers for s in found.values()]
        loose = sorted({number for number, source in every if not isinstance(source, Filed)})
        note = {"rule": rule, "steps": steps, "loose": loose}
        pages = (page for plan in plans for book in plan.books.values() for page in book.pages)
        records = [r for page in pages for r in (self.records[page], self.weights.get(page)) if r is not None]
        self.vault.commit(records, [source for _, source in every], note)

    def finish(self) -> None:
        """Wait until every state is in its file, and that is stamped."""
        super().finish()
        if self.vault is not None and not self.lost:
            try:
                self.vault.wait()
            except BaseException as error:
                self._lose(error)
                raise

    # ----------------------------------------------------------------------------------------------------------- resume

    def resume(
        self, params: Mapping[int, torch.Tensor], layouts: Mapping[int, states.Layout], rule: str, call: str
    ) -> tuple[dict[torch.Tensor, dict[str, Any]], int]:
        """The entries of the last complete step, and how many steps it was; weights that were kept are put back."""
        if self.vault is not None:
            self.vault.close(keep=True)
        self.shown.clear()
        self.vault, self.lost, self.desks = None, "", {}
        self.folder = agreeing.folder_of(self.path, params.values())
        again = partial(reopening.reopened, self.folder, rule=rule, stays=self.keep_weights, call=call)
        again = partial(again, params=params, layouts=layouts)
        if self.folder == self.path:
            self.vault, extents, weights = again(None)
            steps = agreeing.steps_of(self.vault.note)
        else:
            owned = {k for k, p in params.items() if filed.in_files(layouts[k], p)}
            self.vault, extents, weights, steps = agreeing.resumed(self.folder, owned, again, call)
        with torch.no_grad():
            for p, x in weights.items():
                sharded.local(p).copy_(x)
        return {params[k]: self._resumed(params[k], layouts[k], extents, k, steps[k]) for k in steps}, max(
            steps.values()
        )

    def _resumed(
        self, p: torch.Tensor, kept: states.Layout, extents: Mapping[tuple[int, str], Filed], number: int, step: int
    ) -> dict[str, Any]:
        if not filed.in_files(kept, p):
            return {"step": step, **{x.key: sharded.filled(states.beside(x, p), x.first) for x in kept.all}}
        return {"step": step, **self._entry(p, {part.key: extents[number, part.key] for part in kept.all}, kept)}


def _version(x: torch.Tensor) -> tuple[int, int]:
    """What changes when somebody writes to a tensor, or to this rank's part of it."""
    return x._version, sharded.local(x)._version
