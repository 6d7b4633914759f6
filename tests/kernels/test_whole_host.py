"""The compiled loops of the CPU against the oracle, for rules that see whole tensors: the same words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refopt import Optimizer
from refopt.spec import ShapeError
from refopt_cuda.kernels import whole_host
from refopt_cuda.kernels.whole_rules import form_of, rows
from tests.cases import label
from tests.kernels.gpu_step import narrow, widen
from tests.kernels.whole_cases import CASES, numbers, shapes_of, special, weights
from tests.kernels.whole_pair import agree

TURNS = [("float32", "float32"), ("bfloat16", "float16"), ("float16", "bfloat16")]
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


class HostPair:
    """Tensors in NumPy, stepped by both."""

    def __init__(self, case: Any, weight: str, grad: str, params: list[np.ndarray]) -> None:
        self.opt, self.weight, self.grad = Optimizer(case.stem, **case.hyper), weight, grad
        self.form = form_of(case.stem, self.opt.hyper)
        self.words = [narrow(p, weight) for p in params]
        self.state = self.opt.init([widen(w, weight) for w in self.words])
        self.p = [w.copy().view(DTYPES[weight]) for w in self.words]
        self.s = [{n: np.array(x, np.float32) for n, x in s.items() if n != "t"} for s in self.state]

    def step(self, grads: list[np.ndarray]) -> None:
        words, stem, hyper = [narrow(g, self.grad) for g in grads], self.opt.rule.stem, self.opt.hyper
        for p, g, s, theirs in zip(self.p, words, self.s, self.state, strict=True):
            made = rows(stem, theirs["t"] + 1, p.ndim < 2, hyper)
            whole_host.step(self.form, hyper, p, g.view(DTYPES[self.grad]), s, p.shape, made)
        with np.errstate(all="ignore"):
            params = [widen(w, self.weight) for w in self.words]
            params, self.state = self.opt.step(params, [widen(w, self.grad) for w in words], self.state)
            self.words = [narrow(p, self.weight) for p in params]
        for w, p, s, theirs in zip(self.words, self.p, self.s, self.state, strict=True):
            for n, x in s.items():
                want = np.asarray(theirs[n], np.float32).reshape(-1).view(np.uint32)
                agree(f"{n} of {p.shape}", want, x.reshape(-1).view(np.uint32), "float32")
            agree(f"p of {p.shape}", w.reshape(-1), p.reshape(-1).view(w.dtype), self.weight)


@pytest.mark.parametrize("k", range(len(CASES)), ids=lambda k: CASES[k].label)
def test_every_case_steps_as_the_oracle(k: int) -> None:
    case, rng = CASES[k], np.random.default_rng(0)
    shapes = shapes_of(case)
    both = HostPair(case, *TURNS[k % len(TURNS)], weights(rng, shapes))
    for _ in range(3):
        both.step([numbers(rng, s) for s in shapes])


@pytest.mark.parametrize("case", [c for c in CASES if c.label in {"lamb", "lars", "adafactor", "came"}], ids=label)
def test_special_gradients_step_as_the_oracle(case: Any) -> None:
    rng = np.random.default_rng(3)
    both = HostPair(case, "float32", "float32", weights(rng, [(40, 512), (40, 33)]))
    for _ in range(2):
        both.step([special(rng, (40, 512)), special(rng, (40, 33))])


def test_what_does_not_fit_is_refused_before_anything_is_written() -> None:
    hyper = Optimizer("adafactor").hyper
    form, made = form_of("adafactor", hyper), rows("adafactor", 1, False, hyper)
    p, g = np.ones((3, 40), np.float32), np.ones((3, 40), np.float32)
    good = {"R": np.zeros(3, np.float32), "C": np.zeros(40, np.float32)}
    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ShapeError, "R has 4", {"states": good | {"R": np.zeros(4, np.float32)}}),
        (ShapeError, "C are missing", {"states": {"R": good["R"]}}),
        (TypeError, "R must be float32", {"states": good | {"R": np.zeros(3)}}),
        (ShapeError, "g must be 120", {"g": g[:2]}),
        (TypeError, "p must be float32", {"p": p.astype(np.float64)}),
    ]
    for error, words, changed in wrong:
        given: dict[str, Any] = {"p": p, "g": g, "states": good} | changed
        with pytest.raises(error, match=words):
            whole_host.step(form, hyper, given["p"], given["g"], given["states"], (3, 40), made)
    assert (p == 1).all() and not good["R"].any() and not good["C"].any()
