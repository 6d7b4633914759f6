"""`place="paged"`: the bits of the resident step for any pages and any order of work, and states on the host."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.codecs import WEIGHTS
from refopt_cuda.optim import paging, pieces
from refopt_cuda.places import lanes, paged, slabs
from tests.kernels.covering import CODECS, words_of
from tests.optim.pairs import ADAM, CASES, SHAPES, Case, give, snapshot, unchanged, weights
from tests.optim.shuffled import ShuffledLanes
from tests.optim.test_checkpoints import through_a_file, twins
from tests.optim.test_every_codec import MORE

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")
ADAMW = Case("AdamW", "adamw", ADAM | {"weight_decay": 0.11})
ADAMW8 = ADAMW._replace(name="AdamW8bit")
SMALL = [(64, 80), (33, 300), (300, 16), (40,), (), (0,), (16, 3, 40)]
PAGES = {"one block": 1, "a prime number of blocks": 7 * 520, "more than there is": 1 << 30}
every_page = pytest.mark.parametrize("size", PAGES.values(), ids=PAGES)


def pair(case: Case, shapes: Any, dtype: torch.dtype, device: str, size: int = 4000, **options: Any) -> tuple[Any, Any]:
    """The same optimizer twice: states beside the weights, and paged."""
    one, two = weights(shapes, dtype, device), weights(shapes, dtype, device)
    return case.make(one, **options), case.make(two, **options, place="paged", page_bytes=size)


def params_of(opt: Any) -> list[Any]:
    return [p for group in opt.param_groups for p in group["params"]]


def step(opt: Any, seed: int) -> None:
    give(params_of(opt), seed)
    opt.step()


def alike(one: Any, two: Any, steps: int = 3, start: int = 0) -> None:
    """Both take the same steps, compared in weights after each and in states after the last."""
    for t in range(start, start + steps):
        step(one, t)
        step(two, t)
        for k, (p, q) in enumerate(zip(params_of(one), params_of(two), strict=True)):
            assert torch.equal(p, q), f"tensor {k} {tuple(p.shape)}, step {t + 1}"
    for k, (p, q) in enumerate(zip(params_of(one), params_of(two), strict=True)):
        assert one.state[p].keys() == two.state[q].keys()
        for key, x in one.state[p].items():
            y = two.state[q][key]
            same = x.dtype == y.dtype and torch.equal(x.cpu(), y.cpu()) if torch.is_tensor(x) else x == y
            assert same, f"{key} of tensor {k} {tuple(p.shape)}"


def pages_of(opt: Any) -> list[Any]:
    return [page for plan in opt._plans.values() for book in plan.books.values() for page in book.pages]


def owned(opt: Any) -> list[bool]:
    """Of each parameter with states: whether they lie in the slabs."""
    decks = list(opt._home.decks.values())
    return [any(d.owns(opt.state[p]) for d in decks) for p in params_of(opt) if len(opt.state[p]) > 1 and p.numel()]


# ------------------------------------------------------------------------------------------------------- the same bits


@every_page
@pytest.mark.parametrize("case", CASES + MORE, ids=str)
def test_paging_changes_no_bit(case: Case, size: int, device: str) -> None:
    one, two = pair(case, SMALL, torch.float32, device, size, min_8bit_size=1000)
    alike(one, two)


@every_page
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_paging_changes_no_bit_of_other_weights(dtype: torch.dtype, size: int, device: str) -> None:
    alike(*pair(ADAMW8, SHAPES, dtype, device, size))


@pytest.mark.parametrize("codec", CODECS)
def test_paging_changes_no_bit_of_any_codec(codec: str, device: str) -> None:
    alike(*pair(ADAMW, SMALL, torch.bfloat16, device, 3000, codecs=codec, min_8bit_size=1000), steps=2)


@pytest.mark.parametrize("weight", words_of(WEIGHTS))
def test_paging_changes_no_bit_of_any_format_of_weights(weight: str, device: str) -> None:
    """What lies beside the weights travels, too, and random bits are those of the whole tensor."""
    options = {"codecs": {"p": weight, "v": "q4:64"}, "min_8bit_size": 1000, "seed": 5}
    alike(*pair(ADAMW, SMALL, torch.bfloat16, device, 3000, **options), steps=2)


@pytest.mark.parametrize("block", [64, 100, 2048])
def test_paging_changes_no_bit_of_any_block(block: int, device: str) -> None:
    alike(*pair(ADAMW8, [(33, 200), (6, 4096), (5, 1001)], torch.float32, device, 1, block=block))


def test_groups_share_the_ring(device: str) -> None:
    def make(place: dict[str, Any]) -> Any:
        a, b, c = weights([(64, 80), (90, 64), (33,)], torch.bfloat16, device)
        groups = [{"params": [a]}, {"params": [b, c], "lr": 0.3, "betas": (0.7, 0.9), "codecs": {"m": "q4"}}]
        return rc.optim.AdamW8bit(groups, **place)

    alike(make({}), make({"place": "paged", "page_bytes": 2000}))


def test_parameters_without_gradient_keep_their_states_and_counts(device: str) -> None:
    one, two = pair(ADAMW8, [(64, 80), (80, 64), (5,), (7,)], torch.float32, device)
    for t, live in enumerate([(0, 2), (1,), (0, 1, 2, 3), (), (3,)]):
        for opt in (one, two):
            params = params_of(opt)
            give(params, t)
            for k in set(range(4)) - set(live):
                params[k].grad = None
            opt.step()
    alike(one, two, 1, start=9)


def test_parameters_in_another_order_are_stepped_through_a_copy(device: str) -> None:
    opts = pair(ADAMW8, [(96, 64), (40, 300)], torch.bfloat16, device)
    for opt in opts:
        p, q = params_of(opt)
        p.data, q.data = p.detach().clone().t().contiguous().t(), torch.cat([q.detach()] * 2, 1)[:, :300]
        assert not p.is_contiguous() and not q.is_contiguous()
    alike(*opts)


@every_page
def test_any_order_that_the_events_allow_gives_the_same_bits(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages are NaN as soon as they are stored; loads run ahead, stores are late by up to a step."""
    for seed in range(4):
        monkeypatch.setattr(lanes, "lanes_of", lambda kind, device, seed=seed: ShuffledLanes(seed))
        one, two = pair(ADAMW8, [(64, 80), (33, 300), (40,)], torch.float32, "cpu", size)
        alike(one, two, 4)
    order = next(iter(two._home.decks.values())).lanes.order
    if size == 1:
        assert "in in" in " ".join(order), "no load ran ahead"
        assert any(a == "out" and b == "in" for a, b in zip(order, order[1:], strict=False))


@pytest.mark.parametrize("forgotten", ["stored", "loaded", "stepped"])
def test_an_event_that_is_not_waited_for_shows(forgotten: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would say of a pager that forgets one of its three waits."""

    class Forgetful(ShuffledLanes):
        def wait(self, lane: int, event: Any) -> None:
            if lane != {"stored": lanes.IN, "loaded": lanes.STEP, "stepped": lanes.OUT}[forgotten]:
                super().wait(lane, event)

    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Forgetful(1))
    one, two = pair(ADAMW8, [(64, 80), (33, 300)], torch.float32, "cpu", 1)
    with pytest.raises(AssertionError, match="tensor"):
        alike(one, two, 4)


def test_a_zero_rate_changes_no_weight_and_no_later_step(device: str) -> None:
    """What torch.distributed.checkpoint does to make states: a step with g = 0 and lr = 0."""
    _, opt = pair(ADAMW8, [(64, 80), (9,)], torch.bfloat16, device)
    before = [p.detach().clone() for p in params_of(opt)]
    for p in params_of(opt):
        p.grad = torch.zeros_like(p)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params_of(opt), before, strict=True))
    assert all(not opt.state[p][key].any() for p in params_of(opt) for key in opt.state[p] if key.endswith("scales"))


# ------------------------------------------------------------------------------------------------- where the states are


def test_states_are_views_of_host_memory(device: str) -> None:
    _, opt = pair(ADAMW8, SMALL, torch.bfloat16, device)
    step(opt, 0)
    assert all(owned(opt)) and {
        x.device.type for s in opt.state.values() for x in s.values() if torch.is_tensor(x) and x.numel()
    } == {"cpu"}
    codes = opt.state[params_of(opt)[0]]["m.codes"]
    before = codes.clone()
    step(opt, 1)
    assert opt.state[params_of(opt)[0]]["m.codes"] is codes and not torch.equal(codes, before)


def test_small_tensors_share_a_page_and_a_copy() -> None:
    _, opt = pair(ADAMW, [(40,)] * 30, torch.float32, "cpu", 30 * 500)
    step(opt, 0)
    (page,) = pages_of(opt)
    assert len(page.pieces) == 30 and len(page.copies) == 1


@pytest.mark.parametrize("size", [1, 999, 5000, 1 << 30])
def test_pages_hold_every_word_once(size: int) -> None:
    _, opt = pair(ADAMW8, SMALL, torch.float32, "cpu", size)
    step(opt, 0)
    seen: dict[int, list[tuple[int, int]]] = {}
    for page in pages_of(opt):
        for piece in page.pieces:
            for span in piece.spans:
                seen.setdefault(id(span.tensor), []).append((span.start, span.stop))
                assert span.offset % slabs.ALIGN == 0
        assert page.size <= max(size, 2 * 300 * 8) + 8 * slabs.ALIGN or size == 1
    held = [x for s in opt.state.values() for x in s.values() if torch.is_tensor(x) and x.numel()]
    for x in held:
        ends = [stop for _, stop in sorted(seen[id(x)])]
        assert [0, *ends[:-1]] == [start for start, _ in sorted(seen[id(x)])] and ends[-1] == x.numel()
    assert len(seen) == len(held)


@pytest.mark.parametrize(
    ("budget", "stays"), [(0, [0, 0, 0]), (9000, [0, 1, 1]), (10**6, [1, 1, 1]), ("auto", [1] * 3)]
)
def test_what_fits_the_budget_stays(budget: Any, stays: list[int], device: str) -> None:
    """States of 10,400 bytes, 8,000 and 320."""
    shapes = [(64, 80), (1000,), (40,)]
    one = ADAMW8.make(weights(shapes, torch.bfloat16, device))
    two = ADAMW8.make(weights(shapes, torch.bfloat16, device), place="paged", page_bytes=4000, resident_bytes=budget)
    alike(one, two)
    assert owned(two) == [not s for s in stays]
    for p, s in zip(params_of(two), stays, strict=True):
        assert all(x.device.type == (device if s else "cpu") for x in two.state[p].values() if torch.is_tensor(x))
    if all(stays):
        assert not pages_of(two) and all(deck.ring.size == 0 for deck in two._home.decks.values())


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_is_that_of_the_resident_optimizer_and_loading_keeps_paging(device: str) -> None:
    one, two = pair(ADAMW8, SMALL, torch.bfloat16, device)
    alike(one, two)
    saved = through_a_file(two.state_dict())
    again = ADAMW8.make(twins(params_of(two), device), place="paged", page_bytes=777)
    again.load_state_dict(through_a_file(one.state_dict(), map_location="cpu"))
    assert all(owned(again))
    one.load_state_dict(saved)
    alike(one, two, 2, start=7)
    other = ADAMW8.make(twins(params_of(two), device))
    other.load_state_dict(two.state_dict())
    alike(two, other, 2, start=3)


def test_loading_goes_into_the_memory_that_is_there(device: str) -> None:
    _, opt = pair(ADAMW8, [(64, 80), (40,)], torch.float32, device)
    step(opt, 0)
    saved, where = copy.deepcopy(opt.state_dict()), [x.data_ptr() for x in tensors(opt)]
    step(opt, 1)
    opt.load_state_dict(saved)
    assert [x.data_ptr() for x in tensors(opt)] == where
    for k, p in enumerate(params_of(opt)):
        assert all(torch.equal(x, saved["state"][k][key]) for key, x in opt.state[p].items() if torch.is_tensor(x))


def tensors(opt: Any) -> list[torch.Tensor]:
    return [x for p in params_of(opt) for x in opt.state[p].values() if torch.is_tensor(x)]


def test_loading_what_is_its_own_shares_no_memory_with_it() -> None:
    _, opt = pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu")
    step(opt, 0)
    saved = opt.state_dict()
    kept = copy.deepcopy(saved)
    opt.load_state_dict(saved)
    step(opt, 1)
    assert all(torch.equal(x, kept["state"][0][k]) for k, x in saved["state"][0].items() if torch.is_tensor(x))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_pages_too(way: Callable[[Any], Any]) -> None:
    _, opt = pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu")
    step(opt, 0)
    other = way(opt)
    alike(opt, other, 2, start=5)
    assert all(owned(other)) and other._placed == opt._placed


def test_states_that_somebody_moved_are_brought_back(device: str) -> None:
    """Lightning replaces the entries of `state` by copies on the parameters' device."""
    one, two = pair(ADAMW8, [(64, 80), (40,)], torch.bfloat16, device)
    alike(one, two)
    for p, entry in list(two.state.items()):
        two.state[p] = {k: x.to(device, copy=True) if torch.is_tensor(x) else x for k, x in entry.items()}
    assert not any(owned(two))
    alike(one, two, 2, start=5)
    assert all(owned(two))


# --------------------------------------------------------------------------------------------------------------- faults


def test_where_pinning_fails_one_warning_says_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(lanes.HostLanes):
        def pin(self, address: int, size: int) -> None:
            raise MemoryError("cannot lock memory")

    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Refused())
    one, two = pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu")
    with pytest.warns(
        UserWarning, match=r"AdamW8bit\.step: host memory could not be pinned.*a fraction of the link"
    ) as w:
        alike(one, two)
    assert len(w) == 1


def test_everything_that_was_pinned_is_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: dict[int, int] = {}

    class Counted(lanes.HostLanes):
        def pin(self, address: int, size: int) -> None:
            assert address % slabs.PAGE == 0 and address // slabs.CHUNK == (address + size - 1) // slabs.CHUNK
            pinned[address] = size

        def unpin(self, address: int) -> None:
            del pinned[address]

    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Counted())
    gone = []
    for k in range(50):
        _, opt = pair(ADAMW8, [(64, 80), (40,)], torch.float32, "cpu")
        step(opt, 0)
        (deck,) = opt._home.decks.values()
        assert list(pinned.values())[-1] >= deck.slabs.size > 0
        gone.append(weakref.ref(deck))
        del opt, deck
        if k % 10 == 9:
            gc.collect()
            assert not pinned and all(deck() is None for deck in gone)


def test_no_copy_crosses_the_end_of_a_registration() -> None:
    start = 5 * slabs.CHUNK - 300
    found = paged.joined([paged.Copy(0, start, 100), paged.Copy(128, start + 128, 2 * slabs.CHUNK)])
    assert [(c.offset, c.address, c.size) for c in found] == [
        (0, start, 300),
        (300, start + 300, slabs.CHUNK),
        (300 + slabs.CHUNK, start + 300 + slabs.CHUNK, slabs.CHUNK - 172),
    ]


def test_arrays_apart_in_either_memory_travel_apart() -> None:
    copies = [paged.Copy(0, 4096, 64), paged.Copy(64, 4160, 10), paged.Copy(128, 9000, 4), paged.Copy(192, 9064, 0)]
    assert paged.joined(copies) == (paged.Copy(0, 4096, 74), paged.Copy(128, 9000, 4))


def test_a_refused_step_changes_nothing(device: str) -> None:
    _, opt = pair(ADAMW8, [(64, 80), (40,)], torch.float32, device)
    step(opt, 0)
    before = snapshot(opt)
    opt.state[params_of(opt)[1]]["exp_avg"] = torch.zeros(41)
    give(params_of(opt), 1)
    with pytest.raises(refopt.ShapeError, match="'exp_avg' has shape"):
        opt.step()
    opt.state[params_of(opt)[1]]["exp_avg"] = before[1][1]["exp_avg"]
    unchanged(opt, before)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"place": "cloud"}, r"AdamW8bit: place must be one of 'resident', 'paged'.*'cloud'"),
        ({"page_bytes": 5}, r"AdamW8bit: page_bytes is of place='paged' or 'host', and place is 'resident'"),
        ({"place": "paged", "page_bytes": 0}, r"AdamW8bit: page_bytes must be a whole number >= 1, got 0"),
        ({"during_backward": True}, r"AdamW8bit: during_backward is of place='paged', and place is 'resident'"),
        ({"place": "paged", "resident_bytes": "all"}, r"AdamW8bit: resident_bytes must be .* or \"auto\", got 'all'"),
    ],
)
def test_a_wrong_place_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rc.optim.AdamW8bit(weights([(4,)], torch.float32, "cpu"), **options)


def test_a_page_takes_as_many_tensors_as_a_launch() -> None:
    slots = one_step([(2,)] * 3100)._plans[0].slots.values()
    counts = [len(page.pieces) for page in pieces.pages(map(pieces.Grid, slots), 1 << 30, 0)]
    assert sum(counts) == 3100 and max(counts) <= 3072


def one_step(shapes: Any) -> Any:
    opt = ADAMW.make(weights(shapes, torch.float32, "cpu"))
    step(opt, 0)
    return opt


# ------------------------------------------------------------------------------------------------------ during backward


def model(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(80, 96), torch.nn.GELU(), torch.nn.Linear(96, 300), torch.nn.Linear(300, 16)]
    return torch.nn.Sequential(*layers).to(device, dtype)


def backward(net: Any, seed: int) -> None:
    first = next(net.parameters())
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(seed)).to(first.device, first.dtype)
    net(x).square().mean().backward()


def trained(net: Any, opt: Any, steps: int, after: Callable[[], Any] = lambda: None) -> None:
    for t in range(steps):
        opt.zero_grad()
        backward(net, t)
        after()
        opt.step()


@pytest.mark.parametrize("size", [1, 3000, 1 << 30])
def test_steps_during_backward_have_the_same_bits(size: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("refopt_cuda.optim.early.turn", counted := Counted(paging.turn))
    nets = [model(device=device) for _ in range(2)]
    words = ADAMW8.words | {"min_8bit_size": 1000}
    one = rc.optim.AdamW8bit(nets[0].parameters(), **words)
    two = rc.optim.PagedAdamW8bit(nets[1].parameters(), **words, page_bytes=size, during_backward=True)
    for net, opt in zip(nets, (one, two), strict=True):
        trained(net, opt, 4)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and one.state[p]["step"] == two.state[q]["step"] == 4
        assert all(torch.equal(x.cpu(), two.state[q][k]) for k, x in one.state[p].items() if torch.is_tensor(x))
    assert counted.calls == 3 * len(pages_of(two)), "every page of every step but the first was stepped in backward"


class Counted:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.calls = call, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.call(*args)


def test_a_gradient_may_be_gone_before_the_step() -> None:
    """What torch's optimizer-in-backward does to save the memory of gradients."""
    nets = [model() for _ in range(2)]
    one = rc.optim.AdamW8bit(nets[0].parameters(), **ADAMW8.words)
    two = rc.optim.PagedAdamW8bit(nets[1].parameters(), **ADAMW8.words, page_bytes=1, during_backward=True)
    trained(nets[0], one, 3)
    trained(nets[1], two, 1)
    for t in (1, 2):
        two.zero_grad()
        backward(nets[1], t)
        two.zero_grad()
        two.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and two.state[q]["step"] == 3


def test_pages_whose_gradients_do_not_all_arrive_are_left_to_the_step() -> None:
    nets = [model() for _ in range(2)]
    one = rc.optim.AdamW8bit(nets[0].parameters(), **ADAMW8.words)
    two = rc.optim.PagedAdamW8bit(nets[1].parameters(), **ADAMW8.words, page_bytes=50_000, during_backward=True)
    for net, opt in zip(nets, (one, two), strict=True):
        trained(net, opt, 2)
        net[2].requires_grad_(False)
        trained(net, opt, 2)
        net[2].requires_grad_(True)
        trained(net, opt, 2)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and one.state[p]["step"] == two.state[q]["step"]


def test_clipping_is_refused_before_anything_is_changed() -> None:
    net = model()
    opt = rc.optim.PagedAdamW8bit(net.parameters(), during_backward=True)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"PagedAdamW8bit\.step: .*changed after backward.*nothing has been stepped"):
        trained(net, opt, 1, lambda: torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)) and not opt.state


def test_a_scaler_is_refused() -> None:
    net = model()
    opt = rc.optim.PagedAdamW8bit(net.parameters(), during_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(2, 80)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler and accumulation need during_backward=False"):
        scaler.step(opt)
    assert not opt.state


def test_a_second_backward_before_the_step_is_refused() -> None:
    net = model()
    opt = rc.optim.PagedAdamW8bit(net.parameters(), during_backward=True)
    trained(net, opt, 1)
    opt.zero_grad()
    backward(net, 1)
    with pytest.raises(RuntimeError, match=r"PagedAdamW8bit: a second gradient .* every backward pass is a step"):
        backward(net, 2)


def test_hooks_go_with_the_optimizer() -> None:
    net = model()
    opt = rc.optim.PagedAdamW8bit(net.parameters(), during_backward=True)
    del opt
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())


# ------------------------------------------------------------------------------------------------------------ on a GPU


SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
    long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""


def slow_lanes(cycles: list[int]) -> Any:
    """Copies that a spinning kernel holds up for so long in each lane, and places that are NaN once they are stored."""
    import cupy

    spin = cupy.RawKernel(SPIN, "spin")

    class Slow(lanes.CudaLanes):
        def copy(self, lane: int, to: int, source: int, size: int) -> None:
            with self._streams[lane // 2]:
                spin((1,), (1,), (cycles[lane],))
            super().copy(lane, to, source, size)
            if lane == lanes.OUT:
                self._run.memsetAsync(source, 0xFF, size, self.handles[lane])

    return Slow


@pytest.mark.gpu
@pytest.mark.parametrize("cycles", [[300_000, 0, 0], [0, 0, 300_000], [200_000, 0, 100_000]], ids=["in", "out", "both"])
def test_slow_copies_and_poisoned_places_change_no_bit(cycles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    slow = slow_lanes(cycles)
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: slow(device))
    alike(*pair(ADAMW8, [(64, 80), (33, 300), (256, 256), (40,)], torch.bfloat16, "cuda", 20_000), steps=4)


@pytest.mark.gpu
def test_the_device_holds_the_ring_and_no_state() -> None:
    """64M weights: f32 states would be 512 MB; the ring is three pages."""
    params = [torch.nn.Parameter(torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(4)]
    for p in params:
        p.grad = torch.ones_like(p)
    opt = rc.optim.PagedAdamW(params)
    torch.cuda.synchronize()
    before, free = torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]
    for _ in range(2):
        opt.step()
    torch.cuda.synchronize()
    ring = 3 * next(iter(opt._home.decks.values())).ring.size
    assert torch.cuda.memory_allocated() - before <= ring + 4096
    assert free - torch.cuda.mem_get_info()[0] <= ring + (64 << 20), "kernels and their tables, beside the ring"
    loaded = rc.optim.PagedAdamW([torch.nn.Parameter(p.detach()) for p in params])
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    loaded.load_state_dict(opt.state_dict())
    assert torch.cuda.max_memory_allocated() == held, "loading went through the device"
    assert all(owned(loaded)) and all(owned(opt))


@pytest.mark.gpu
def test_fifty_optimizers_leave_nothing_on_the_device() -> None:
    def once() -> None:
        (p,) = weights([(512, 512)], torch.bfloat16, "cuda")
        opt = rc.optim.PagedAdamW8bit([p], page_bytes=100_000)
        step(opt, 0)
        opt.state_dict()

    for _ in range(5):  # what the driver keeps for itself is there then
        once()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, held = torch.cuda.mem_get_info()[0], torch.cuda.memory_allocated()
    for _ in range(50):
        once()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= held and free - torch.cuda.mem_get_info()[0] <= 4 << 20


@pytest.mark.gpu
def test_a_step_waits_for_nothing_and_states_for_the_last_copy() -> None:
    one, two = pair(ADAMW8, [(512, 512), (300,)], torch.bfloat16, "cuda", 100_000)
    alike(one, two)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    give(params_of(one), 7)
    give(params_of(two), 7)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        two.step()
        assert not stream.query(), "the step waited for the stream"
        codes = two.state[params_of(two)[0]]["m.codes"].clone()
    one.step()
    assert torch.equal(codes, one.state[params_of(one)[0]]["m.codes"].cpu())


@pytest.mark.gpu
def test_states_that_do_not_fit_beside_the_weights_train_paged() -> None:
    """All device memory through an allocator that a limit binds: resident states fail, paged ones do not."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    params = [torch.nn.Parameter(torch.zeros(4096, 4096, device="cuda", dtype=torch.bfloat16)) for _ in range(8)]
    for p in params:
        p.grad = torch.ones_like(p)
    limit = torch.cuda.memory_reserved() + (256 << 20)  # the states take 1 GiB
    torch.cuda.set_per_process_memory_fraction(limit / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"place=\"paged\""):
            rc.optim.AdamW(params).step()
        gc.collect()
        torch.cuda.empty_cache()
        opt = rc.optim.PagedAdamW(params)
        opt.step()
        torch.cuda.synchronize()
        assert all(owned(opt)) and all(bool((p != 0).all()) for p in params)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
