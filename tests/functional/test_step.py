"""`refopt_cuda.step` on arrays of every library, beside `refopt.Optimizer`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt.spec import Box
from refopt_cuda.quantization import Quantized
from refopt_cuda.rules import RULES as KERNELS
from tests.cases import RULES
from tests.functional.test_quantize import LIBRARIES, given, same, taken
from tests.optim.pairs import record
from tests.strategies import log_uniform

CASES = [case for case in RULES if case.stem in KERNELS][::3]
SHAPES = [(5, 40), (64, 128), (300,), ()]


def arrays(seed: int, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(log_uniform(rng, s, -4, 0), np.float32) for s in shapes]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("codec", ["f32", "q4:64"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_step_of_any_rule_is_the_references(case: Any, codec: str, library: str) -> None:
    opt = case.optimizer(refopt, record(codec), seed=0)
    p = arrays(0, SHAPES)
    ours, want, state = [given(a.copy(), library) for a in p], p, opt.init(p)
    kept = [rc.init(case.stem, a, codec, **case.hyper) for a in ours]
    for t in range(3):
        g = arrays(10 + t, SHAPES)
        skipped = [None if t == 1 and k == 1 else a for k, a in enumerate(g)]
        rc.step(case.stem, ours, [None if a is None else given(a, library) for a in skipped], kept, **case.hyper)
        want, state = opt.step(want, skipped, state)
        for k, (a, b) in enumerate(zip(ours, want, strict=True)):
            same(taken(a), b, f"step {t + 1}, tensor {k}: p")
            agrees(kept[k], state[k], f"step {t + 1}, tensor {k}")


def agrees(mine: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    assert mine["t"] == theirs["t"]
    for name, want in theirs.items():
        if name == "t":
            continue
        have = mine[name]
        if isinstance(want, Box):
            assert isinstance(have, Quantized)
            for part, a in want.arrays.items():
                same(taken(have.arrays[part]).view(a.dtype), a, f"{what}: {name}.{part}")
        else:
            same(taken(have), want, f"{what}: {name}")


@pytest.mark.parametrize("library", LIBRARIES[1:])
@pytest.mark.parametrize("weight", ["bf16_rem16", "bf16_sr", "bf16_kahan", "bf16_ecc.16"])
def test_bfloat16_weights_keep_their_rest(weight: str, library: str) -> None:
    opt = refopt.Optimizer("adamw", {"p": record(weight), "m": "dynamic8"}, lr=0.01, wd=0.1, seed=7)
    rounded = [refopt.codecs.bf16.encode(a).decode() for a in arrays(0, SHAPES)]
    kind = "cuda" if library == "torch-cuda" else "cpu"
    words = [refopt.codecs.bf16.encode(a).codes for a in rounded]
    if "torch" in library:
        ours = [torch.from_numpy(w.view(np.int16)).view(torch.bfloat16).to(kind) for w in words]
    else:
        ours = [given(w, library) for w in words]
    kept, state, want = [rc.init("adamw", a, {"p": weight, "m": "dynamic8"}) for a in ours], opt.init(rounded), rounded
    for t in range(3):
        g = arrays(20 + t, SHAPES)
        rc.step("adamw", ours, [given(a, library) for a in g], kept, lr=0.01, wd=0.1, seed=7)
        want, state = opt.step(want, g, state)
    for a, b in zip(ours, want, strict=True):
        same(taken(a), refopt.codecs.bf16.encode(b).codes, "p")


def test_anything_with_dlpack_is_stepped_in_place() -> None:
    class Foreign:
        """An array of some other library."""

        def __init__(self, a: np.ndarray) -> None:
            self.a = a

        def __dlpack__(self, **words: Any) -> Any:
            return self.a.__dlpack__(**words)

        def __dlpack_device__(self) -> Any:
            return self.a.__dlpack_device__()

    p = np.ones(300, np.float32)
    state = rc.init("lion", Foreign(p))
    rc.step("lion", Foreign(p), Foreign(np.ones(300, np.float32)), state, lr=0.5)
    assert (p == 0.5).all()


def test_what_cannot_be_stepped_is_named_and_nothing_is_written() -> None:
    p, g = np.ones(3, np.float32), np.ones(3, np.float32)
    state = rc.init("adamw", p)
    for words, error, message in [
        ({"rule": "adamv"}, ValueError, "no rule 'adamv'; there are sgd, "),
        ({"rule": "muon"}, ValueError, "no kernel for rule 'muon'; there are sgd, "),
        (
            {"g": np.ones(4, np.float32)},
            refopt.ShapeError,
            r"params\[0\] and grads\[0\] have shapes \(3,\) and \(4,\)",
        ),
        ({"state": {"t": 0}}, refopt.StateError, r"state\[0\] has no 'm'"),
        ({"state": []}, refopt.StateError, r"state\[0\] must be what init returned, got list"),
        ({"lr": -1.0}, ValueError, "lr .*-1.0"),
    ]:
        with pytest.raises(error, match=f"step: .*{message}"):
            rc.step(**{"rule": "adamw", "p": p, "g": g, "state": state, **words})
    with pytest.raises(ValueError, match=r"^init: adamw has no role 'u'; it has m, v and p"):
        rc.init("adamw", p, {"u": "f32"})
    with pytest.raises(
        ValueError, match=r"^init: codecs\['p'\] = 'bf16_sr' must be one of bf16_sr, .* of bfloat16 weights"
    ):
        rc.init("adamw", p, {"p": "bf16_sr"})
    assert (p == 1).all() and state["t"] == 0 and not state["m"].any()
