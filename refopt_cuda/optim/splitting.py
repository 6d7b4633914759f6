"""`place="auto"`: each parameter's states stay, stream or are stepped on the host, whichever makes a step shortest.

States stay on the device while they fit, parameters in their order: what stays costs nothing. Each of the others goes
where it takes less, and streams if that makes no difference:

    streams           the bytes of its states over the link's, each way with both busy
    on the host       the longer of: gradient and weights down the link; its elements over the host's

Both use the host's memory to its limit, so that their seconds add up: a step that streams a half and has the host step
the other took 253 ms where a sum says 299 and the longer of the two 211 (`gpu_host`, 16 cores and an H100).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from refopt_cuda.optim import settings, states, worker
from refopt_cuda.optim.decks import Deck
from refopt_cuda.optim.hosting import Hosted
from refopt_cuda.optim.paging import Home, Paged
from refopt_cuda.optim.run import Plan, Slot, Work, on_host
from refopt_cuda.optim.watched import Entry
from refopt_cuda.places import lanes
from refopt_cuda.places.slabs import Slabs
from refopt_cuda.rules import Form, form_of

LOG = logging.getLogger("refopt_cuda")
PLACES = ("resident", "paged", "host")
SAMPLE = 1 << 26
"""Bytes that are copied each way to measure the link."""
SIDE = 6144
"""Rows and columns of the matrix that the host steps to measure itself: more than its caches hold."""


class Need(NamedTuple):
    """What one parameter brings: bytes of states, weights and gradient, and its elements."""

    states: int
    p: int
    g: int
    elements: int


class Rates(NamedTuple):
    """Bytes a second of the link, each way while both are busy, and elements a second that the host steps."""

    link: float
    host: float


class Load(NamedTuple):
    """Seconds of a step: of the states that stream, and of the parameters that the host steps."""

    paged: float = 0.0
    host: float = 0.0

    @property
    def seconds(self) -> float:
        """How long the step takes."""
        return self.paged + self.host

    def streamed(self, need: Need, rates: Rates) -> Load:
        """With these states streamed, too."""
        return Load(self.paged + need.states / rates.link, self.host)

    def hosted(self, need: Need, rates: Rates) -> Load:
        """With this parameter stepped by the host, too."""
        return Load(self.paged, self.host + max((need.g + need.p) / rates.link, need.elements / rates.host))


class Split(NamedTuple):
    """A plan: the place of each parameter, what was counted on, and the seconds of a step."""

    places: tuple[str, ...]
    needs: tuple[Need, ...]
    rates: Rates | None
    load: Load

    def __str__(self) -> str:
        lines = []
        for place in PLACES:
            some = [n for n, at in zip(self.needs, self.places, strict=True) if at == place]
            size = sum(n.states for n in some) / 1e9
            lines.append(f"{place:<9} {len(some):>6} tensors {size:>10.3f} GB of states")
        if self.rates is None:
            return "\n".join([*lines, "all states stay: nothing moves"])
        busy = f"paged {1e3 * self.load.paged:.1f} ms, host {1e3 * self.load.host:.1f} ms"
        rates = f"link {self.rates.link / 1e9:.1f} GB/s each way, host {self.rates.host / 1e9:.2f}e9 elements/s"
        return "\n".join([*lines, f"a step takes {1e3 * self.load.seconds:.1f} ms: {busy} ({rates})"])


def split(needs: Sequence[Need], spare: int, measure: Callable[[], Rates]) -> Split:
    """The plan for these parameters with `spare` bytes of the device for states; measures only what it has to."""
    places, rest = ["resident"] * len(needs), []
    for k, need in enumerate(needs):
        if need.states <= spare:
            spare -= need.states
        else:
            rest.append(k)
    if not rest:
        return Split(tuple(places), tuple(needs), None, Load())
    load, rates = Load(), measure()
    for k in rest:
        streamed, hosted = load.streamed(needs[k], rates), load.hosted(needs[k], rates)
        away = hosted.seconds < streamed.seconds
        places[k], load = ("host", hosted) if away else ("paged", streamed)
    return Split(tuple(places), tuple(needs), rates, load)


# ------------------------------------------------------------------------------------------------------------- measured


def link(deck: Deck) -> float:
    """Bytes a second each way, while pinned memory is copied both ways."""
    pool = Slabs(deck.lanes)
    here = [pool.take(SAMPLE).ctypes.data for _ in range(2)]
    there = torch.empty(2 * SAMPLE, dtype=torch.uint8, device=deck.device)
    pool.pin("place='auto'")
    if deck.device.type == "cuda":  # whoever had this memory before may still be at work
        torch.cuda.current_stream().synchronize()
    found = []
    for _ in range(3):
        deck.lanes.finish()
        start = time.perf_counter()
        for at in range(0, SAMPLE, 1 << 24):
            deck.lanes.copy(lanes.IN, there.data_ptr() + at, here[0] + at, 1 << 24)
            deck.lanes.copy(lanes.OUT, here[1] + at, there.data_ptr() + SAMPLE + at, 1 << 24)
        deck.lanes.finish()
        found.append(SAMPLE / (time.perf_counter() - start))
    return statistics.median(found)


def host(opt: Any, group: Mapping[str, Any], hyper: dict[str, Any], like: torch.Tensor) -> float:
    """Elements a second of a matrix that the host steps as it would step `like`, of this group."""
    p = torch.zeros(SIDE, SIDE, dtype=like.dtype)
    kept = states.layout(opt.rule, hyper, group, p)
    slot = Slot(p, kept, Entry.of(states.ready(kept, None, p, "place='auto'")), 0)
    form = form_of(opt.rule.stem, hyper)
    work, row = Work(slot, torch.zeros_like(p), 1), Plan.row(form, hyper, group, 1)

    def seconds() -> float:
        start = time.perf_counter()
        on_host(form, work, row)
        return time.perf_counter() - start

    worker.heed()
    found = [worker.submit(seconds).result() for _ in range(4)]
    return p.numel() / statistics.median(found[1:])


# --------------------------------------------------------------------------------------------------------------- places


class Mixed(Home):
    """Where an optimizer's states live: beside the weights, streamed or on the host, as a plan says."""

    shards = False

    def __init__(self, page_bytes: int | None, resident_bytes: int | str, during_backward: bool = False) -> None:
        self.paged, self.hosted = Paged(page_bytes, resident_bytes, during_backward), Hosted(page_bytes, 0)
        self.hosted.pair = 1  # its copies do not queue behind those of the pages
        self.plans: dict[torch.device, Split] = {}
        self.known: Any = WeakTensorKeyDictionary()
        self._last: list[int] = []

    @property
    def decks(self) -> dict[Any, Deck]:
        """Those of both."""
        return {(home, d): deck for home in (self.paged, self.hosted) for d, deck in home.decks.items()}

    def decide(self, opt: Any, call: str) -> None:
        """Give every parameter that is new its place, and log the plan."""
        every = [id(p) for group in opt.param_groups for p in group["params"]]
        if every == self._last:
            return
        self._last = every
        groups = [(group, settings.hyper_of(opt.rule, group, call)) for group in opt.param_groups]
        new = [(p, g, h) for g, h in groups for p in g["params"] if p.requires_grad and p not in self.known]
        for device in dict.fromkeys(p.device for p, *_ in new):
            mine = [(p, g, h) for p, g, h in new if p.device == device]
            found = self._plan(opt, device, mine)
            for (p, *_), place in zip(mine, found.places, strict=True):
                home = self.hosted if place == "host" else self.paged
                self.known[p], home.resident[p] = place, place == "resident"
            self.plans[device] = found
            LOG.info("%s on %s:\n%s", call, device, found)

    def _plan(self, opt: Any, device: torch.device, mine: Sequence[tuple[torch.Tensor, Any, Any]]) -> Split:
        kept = [states.layout(opt.rule, hyper, group, p) for p, group, hyper in mine]
        needs = [
            Need(sum(part.bytes for part in k.all), p.nbytes, p.nbytes, p.numel())
            for k, (p, *_) in zip(kept, mine, strict=True)
        ]
        p, group, hyper = max(mine, key=lambda x: x[0].numel())
        deck = self.paged.deck(device)
        spare = self.paged.spare(device)
        with deck.current:
            found = split(needs, spare, lambda: Rates(link(deck), host(opt, group, hyper, p)))
        deck.spare = spare - sum(n.states for n, at in zip(needs, found.places, strict=True) if at == "resident")
        return found

    def _of(self, p: torch.Tensor) -> Paged:
        return self.hosted if self.known.get(p) == "host" else self.paged

    def ready(self, kept: states.Layout, have: dict[str, Any] | None, p: torch.Tensor, call: str) -> dict[str, Any]:
        return self._of(p).ready(kept, have, p, call)

    def restore(self, known: states.Layout, saved: Any, p: torch.Tensor, have: Any) -> dict[str, Any]:
        return self._of(p).restore(known, saved, p, have)

    def arrange(self, plan: Plan, call: str) -> None:
        self.paged.arrange(plan, call)
        self.hosted.arrange(plan, call)

    def holds(self, slot: Slot) -> bool:
        return self._of(slot.p).holds(slot)

    def step(self, plan: Plan, form: Form, work: Iterable[Work], rows: Mapping[torch.device, Any]) -> None:
        """Pages first: they are only enqueued, and pass while the host is at work."""
        work = list(work)
        for home in (self.paged, self.hosted):
            home.step(plan, form, [w for w in work if self._of(w.slot.p) is home], rows)

    def join(self) -> None:
        self.paged.join()
        self.hosted.join()

    def passed(self) -> None:
        self.paged.passed()

    def finish(self) -> None:
        self.paged.finish()
        self.hosted.finish()
