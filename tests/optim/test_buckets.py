"""Which tensors a launch is bound to, and what each step hands it: a recorder stands in for the kernel."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.kernels import step_cuda
from refopt_cuda.optim import run
from tests.optim.pairs import give, weights

SKIP = step_cuda.SKIP


class Recorder:
    """Takes the calls of `step_cuda.Launch`."""

    def __init__(self) -> None:
        self.bound: list[list[int]] = []
        self.runs: list[tuple[list[int], np.ndarray, list[int] | None]] = []

    def bind(self, tensors: list[step_cuda.Tensor]) -> None:
        self.bound.append([t.p for t in tensors])

    def run(
        self, grads: list[int], scalars: np.ndarray, which: list[int] | None, stream: int, random: list[int]
    ) -> None:
        assert len(grads) == len(self.bound[-1])
        self.runs.append((grads, scalars, which))


@pytest.fixture(autouse=True)
def no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cuda, "on_stream", lambda handle: nullcontext())


def bucket_of(shapes: list[tuple[int, ...]]) -> tuple[Any, list[run.Slot], list[torch.Tensor]]:
    """A bucket, and a slot and a gradient for each parameter of an optimizer that has made one step."""
    params = weights(shapes, torch.float32, "cpu")
    give(params, 0)
    opt = rc.optim.AdamW8bit(params)
    opt.step()
    return run.Bucket(Recorder()), list(opt._plans[0].slots.values()), [p.grad for p in params]


def step(bucket: Any, slots: list[run.Slot], grads: list[torch.Tensor], counts: dict[int, int]) -> None:
    """One step of the parameters `counts`, {index: step count}."""
    work = [run.Work(slots[k], grads[k], t) for k, t in counts.items()]
    bucket.step(work, {t: run.Row(np.full(8, t, np.float32), 0) for t in counts.values()}, 0)


def test_the_first_step_binds_and_later_ones_do_not() -> None:
    bucket, slots, grads = bucket_of([(64, 80), (9,), (80, 64)])
    for t in (1, 2):
        step(bucket, slots, grads, dict.fromkeys(range(3), t))
    assert bucket.launch.bound == [[s.p.data_ptr() for s in slots]]
    for t, (pointers, scalars, which) in enumerate(bucket.launch.runs, 1):
        assert pointers == [g.data_ptr() for g in grads] and scalars.shape == (1, 8) and which is None
        assert (scalars == t).all()


def test_a_parameter_without_gradient_is_skipped_in_its_place() -> None:
    bucket, slots, grads = bucket_of([(64, 80), (9,), (80, 64)])
    step(bucket, slots, grads, {0: 1, 1: 1, 2: 1})
    step(bucket, slots, grads, {2: 2, 0: 2})
    step(bucket, slots, grads, {1: 2})
    assert len(bucket.launch.bound) == 1
    assert [r[0] for r in bucket.launch.runs[1:]] == [
        [grads[0].data_ptr(), SKIP, grads[2].data_ptr()],
        [SKIP, grads[1].data_ptr(), SKIP],
    ]


def test_a_new_parameter_is_bound_beside_those_that_wait() -> None:
    bucket, slots, grads = bucket_of([(64, 80), (9,), (80, 64)])
    step(bucket, slots, grads, {0: 1, 1: 1})
    step(bucket, slots, grads, {1: 2, 2: 1})
    assert [len(b) for b in bucket.launch.bound] == [2, 3]
    assert bucket.launch.bound[1] == [slots[k].p.data_ptr() for k in (1, 2, 0)]
    pointers, scalars, which = bucket.launch.runs[-1]
    assert pointers == [grads[1].data_ptr(), grads[2].data_ptr(), SKIP]
    assert [scalars[k, 0] for k in which[:2]] == [2, 1]


def test_a_slot_that_replaces_another_takes_its_place() -> None:
    bucket, slots, grads = bucket_of([(64, 80), (9,)])
    step(bucket, slots, grads, {0: 1, 1: 1})
    slots[0].p.data = slots[0].p.detach().clone()
    slots[0] = run.Slot(slots[0].p, slots[0].kept, slots[0].state, 0)
    step(bucket, slots, grads, {0: 2, 1: 2})
    assert bucket.launch.bound[1] == [s.p.data_ptr() for s in slots]
    assert list(bucket.places) == slots


def test_more_step_counts_than_a_launch_has_rows() -> None:
    n = step_cuda.ROWS + 2
    bucket, slots, grads = bucket_of([(4, 4)] * n)
    step(bucket, slots, grads, {k: 10 + k for k in range(n)})
    first, second = bucket.launch.runs
    assert first[1].shape == (step_cuda.ROWS, 8) and second[1].shape == (2, 8)
    assert [p == SKIP for p in first[0]] == [k >= step_cuda.ROWS for k in range(n)]
    assert [p == SKIP for p in second[0]] == [k < step_cuda.ROWS for k in range(n)]
    assert [first[1][first[2][k], 0] for k in range(8)] == list(range(10, 18))
    assert [second[1][second[2][k], 0] for k in (8, 9)] == [18, 19]


def test_gradients_and_parameters_in_another_order_go_through_row_major_copies() -> None:
    bucket, slots, _ = bucket_of([(64, 80)])
    p = torch.nn.Parameter(torch.arange(12.0).view(3, 4).t())
    slot = run.Slot(p, slots[0].kept, slots[0].state, 0)
    with torch.no_grad():
        bucket.step([run.Work(slot, torch.ones(3, 4).t(), 1)], {1: run.Row(np.ones(8, np.float32), 0)}, 0)
    assert bucket.launch.bound == [[slot.dense.data_ptr()]] and slot.dense.is_contiguous()
    assert slot.dense.data_ptr() != p.data_ptr() and torch.equal(slot.dense, p)
