"""`place="paged"`: the bits of the resident step for any pages, and states on the host."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.codecs import WEIGHTS
from refopt_cuda.places import slabs
from tests.kernels.covering import CODECS, words_of
from tests.optim.pairs import CASES, SHAPES, Case, give, weights
from tests.optim.placed import (
    ADAMW,
    ADAMW8,
    PAGES,
    SMALL,
    alike,
    owned,
    pages_of,
    pair,
    params_of,
    step,
    tensors,
)
from tests.optim.test_checkpoints import through_a_file, twins
from tests.optim.test_every_codec import MORE

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")
every_page = pytest.mark.parametrize("size", PAGES.values(), ids=PAGES)


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
