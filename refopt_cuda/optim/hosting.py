"""`place="host"`: states in host memory, stepped by the host's threads; weights and gradients come down in pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any

import numpy as np
import torch

from refopt_cuda.optim import worker
from refopt_cuda.optim.decks import Book, Deck, Round
from refopt_cuda.optim.paging import Paged
from refopt_cuda.optim.pieces import Page, Piece
from refopt_cuda.optim.run import Slot, Work, on_host, words
from refopt_cuda.places.host import Move, Staging, Turn
from refopt_cuda.places.slabs import ALIGN, up

PAGE_BYTES = 1 << 27
"""Bytes a page unless told otherwise: for every page all threads must be brought together."""
BUFFERS = 4
"""Places of the staging memory: two come down, one is stepped, one goes up."""


class HostPiece:
    """A piece of a parameter on the host: weights in the staging place, states where they live."""

    first: int
    copied = False

    def __init__(self, piece: Piece, dense: torch.Tensor) -> None:
        self.p, self.kept, self.number, self.state = piece.p, piece.kept, piece.number, piece.state
        self.first, self.shape, self.dense = piece.first, piece.shape, dense
        self._spans, self._group = piece.spans, piece.by_state

    def take(self) -> None: ...

    def put(self) -> None: ...

    @property
    def arrays(self) -> tuple[np.ndarray, list[dict[str, np.ndarray]], np.ndarray | None]:
        """For the compiled loops."""
        parts = [words(span.tensor.view(-1)[span.start : span.stop]) for span in self._spans]
        states, rest = self._group(parts)
        return words(self.dense), [dict(zip(("codes", "scales"), a, strict=False)) for a in states], rest


class Hosted(Paged):
    """Where an optimizer's states live: in host memory, but for `resident_bytes` of them beside the weights.

    CPU parameters have theirs beside them anyway, and are stepped where they are, unless `rehearsal` says otherwise.
    Pages are the work of a thread, so that backward goes on while those are stepped that are ahead of `step`.
    """

    usual = PAGE_BYTES
    rehearsal, shards = False, True

    def __init__(self, page_bytes: int | None, resident_bytes: int | str, during_backward: bool = False) -> None:
        super().__init__(page_bytes, resident_bytes, during_backward)
        self._ahead: list[Future[None]] = []

    def holds(self, slot: Slot) -> bool:
        return super().holds(slot) and (slot.p.is_cuda or self.rehearsal)

    def size(self, slots: Sequence[Any]) -> int:
        """Bytes of states a page, so that weights and gradients, which pass through the staging memory, are no more."""
        kept = [(slot.dense.nbytes + 4 * slot.dense.numel(), self.kept(slot)) for slot in slots]
        return int(self.page_bytes / max([1.0, *(passing / states for passing, states in kept if states)]))

    def kept(self, slot: Any) -> int:
        """Bytes of a parameter's states."""
        beside = 0 if slot.beside is None else slot.beside.nbytes
        return sum(x.nbytes for tensors in slot.tensors for x in tensors) + beside

    def room(self, deck: Deck, book: Book, call: str) -> None:
        """Staging memory for the largest page: its weights, and gradients of at most four bytes."""
        size = max((sum(_staged(x.dense) for x in page.pieces) for page in book.pages), default=0)
        if not isinstance(deck.ring, Staging) or deck.ring.size < size:
            self.wait()
            deck.lanes.finish()
            deck.memory = torch.from_numpy(deck.slabs.take(BUFFERS * size))
            with deck.current:
                deck.ring = Staging(deck.lanes, deck.memory.data_ptr(), size, BUFFERS)
                deck.slabs.pin(call)

    def turn(self, book: Book, now: Round) -> None:
        """Step these parameters, but for pages that have been stepped ahead."""
        worker.heed()
        now.take(now.works)
        ready = now.deck.mark()
        for page in book.pages:
            pieces = [piece for piece in page.pieces if piece.slot in now.works and not page.turned]
            if pieces:
                self._give(pieces, now, ready)
        self.wait()
        now.deck.ring.settle()
        now.put()

    def early(self, book: Book, page: Page, now: Round) -> bool:
        """Have the thread step one page, all of whose gradients are there."""
        now.deck.begin()
        self._give(page.pieces, now, now.deck.mark())
        return True

    def _give(self, pieces: Sequence[Piece], now: Round, ready: Any) -> None:
        """Have the thread step a page whose gradients are there when `ready` is."""
        now.deck.ring.give(self._staged(pieces, now), ready)
        self._ahead.append(worker.submit(_advance, now.deck))

    def _staged(self, pieces: Sequence[Piece], now: Round) -> Turn:
        """The next page of a step: what comes down, and what is done with it."""
        deck, grads = now.deck, now.grads
        start, moves, todo = deck.ring.given % BUFFERS * deck.ring.size, list[Move](), list[Any]()
        place, end = deck.memory[start : start + deck.ring.size], 0
        for piece in pieces:
            found = []
            for x, back in ((piece.dense, True), (piece.of(grads[piece.slot]), False)):
                moves.append(Move(end, x.data_ptr(), x.nbytes, back))
                found.append(place[end : end + x.nbytes].view(x.dtype).view(x.shape))
                end += up(x.nbytes, ALIGN)
            todo.append(self.below(piece, found[0], found[1], now.works[piece.slot]))
        return Turn(moves, self.steps(todo, now), [grads[piece.slot] for piece in pieces])

    def below(self, piece: Piece, p: torch.Tensor, g: torch.Tensor, w: Work) -> Any:
        """The work on a piece whose weights and gradient have come down to `p` and `g`."""
        return Work(HostPiece(piece, p), g, w.t)  # type: ignore[arg-type]

    def steps(self, todo: Sequence[Any], now: Round) -> Callable[[], None]:
        """What steps such pieces."""

        def step() -> None:
            for w in todo:
                on_host(now.form, w, now.rows[w.t])

        return step

    def wait(self) -> None:
        """Wait for what the thread has been given; raises what it raised."""
        wait(self._ahead)  # interrupted, they are still there to be waited for
        ahead, self._ahead = self._ahead, []
        for job in ahead:
            job.result()

    def join(self) -> None:
        self.wait()
        for deck in self.decks.values():
            if isinstance(deck.ring, Staging):
                with deck.current:
                    deck.ring.settle()
                    deck.lanes.flush()

    def passed(self) -> None:
        """The thread goes on until the step."""

    def finish(self) -> None:
        self.wait()
        super().finish()


def _advance(deck: Deck) -> None:
    with deck.current:
        deck.ring.advance()


def _staged(dense: torch.Tensor) -> int:
    """Bytes of weights and a gradient in the staging memory."""
    return up(dense.nbytes, ALIGN) + up(4 * dense.numel(), ALIGN)
