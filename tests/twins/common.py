"""What the twins are held against: the oracle's step on the same bits, and inputs that are hard on arithmetic."""

from __future__ import annotations

import copy
import math
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from refopt import Optimizer, codecs
from refopt.spec import Box

HYPERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.03, "momentum": 0.85, "dampening": 0.2, "wd": 0.07},
    "adam": {"lr": 0.01, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "wd": 0.06},
    "adamw": {"lr": 0.01, "beta1": 0.8, "beta2": 0.97, "eps": 1e-7, "wd": 0.1},
    "lion": {"lr": 0.003, "beta1": 0.85, "beta2": 0.95, "wd": 0.2},
}
"""No value here makes two rules, or two orders of the same rule, coincide."""

STATES = {"sgd": ("buf",), "adam": ("m", "v"), "adamw": ("m", "v"), "lion": ("m",)}
BF16 = ml_dtypes.bfloat16

SHAPES = st.sampled_from(
    [(), (0,), (3, 0), (1,), (2,), (31,), (255,), (256,), (257,), (4095,), (4096,), (4097,)]
    + [(5, 3), (40, 15), (40, 16), (7, 100), (3, 256), (3, 300), (2, 3, 130)]
)


@st.composite
def inputs(draw: st.DrawFn, shapes: st.SearchStrategy = SHAPES) -> tuple[np.ndarray, list[np.ndarray]]:
    """Float32 weights and three gradients: log-uniform, zeros, an outlier, sometimes NaN, Inf, subnormals."""
    shape = draw(shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low = draw(st.floats(-12, 6))
    high = draw(st.floats(low, 6))
    specials = draw(st.sampled_from(["none", "none", "zeros", "subnormal", "nan", "inf", "all zero"]))

    def array(kind: str) -> np.ndarray:
        x = rng.choice([-1.0, 1.0], shape) * 10 ** (low + (high - low) * rng.random(shape))
        x = np.asarray(x, np.float32)
        _plant(x.reshape(-1), kind, rng)
        return x

    return array("none"), [array(specials), array("outlier"), array(specials)]


def _plant(flat: np.ndarray, kind: str, rng: np.random.Generator) -> None:
    if flat.size == 0 or kind == "none":
        return
    if kind == "all zero":
        flat[:] = 0
    elif kind in ("zeros", "subnormal"):
        some = rng.random(flat.size) < 0.3
        flat[some] = -0.0 if kind == "zeros" else 3e-42
    elif kind == "outlier":
        flat[rng.integers(flat.size, size=-(-flat.size // 256))] *= np.float32(1e4)
    else:
        flat[rng.integers(flat.size)] = np.nan if kind == "nan" else -np.inf


def oracle(rule: str, names: tuple[str, ...], blocks: tuple[int, ...], p_codec: str = "f32", **hyper: Any) -> Optimizer:
    """The oracle with codec names[i] of block blocks[i] for state i."""
    given: dict[str, Any] = {"p": p_codec}
    for role, name, block in zip(STATES[rule], names, blocks, strict=False):
        record = codecs.CODECS[name]
        given[role] = record(block=block) if record.scope == "block" else record
    return Optimizer(rule, codecs=given, **(HYPERS[rule] | hyper))


def stored(rule: str, names: tuple[str, ...], state: dict[str, Any]) -> list[dict[str, np.ndarray]]:
    """A deep copy of the oracle's state of one tensor, as the twins take it."""
    arrays = [state[role] for role in STATES[rule][: len(names)]]
    return [copy.deepcopy(a.arrays if isinstance(a, Box) else {"codes": a}) for a in arrays]


def words(a: np.ndarray) -> np.ndarray:
    """The array's bits as unsigned integers, every NaN as one value."""
    bits = a.reshape(-1).view(f"u{a.dtype.itemsize}").copy()
    if a.dtype.kind == "f" or a.dtype == BF16:
        bits[np.isnan(a.reshape(-1))] = np.iinfo(bits.dtype).max
    return bits


def assert_same_bits(got: np.ndarray, want: np.ndarray, what: str) -> None:
    assert (got.dtype, got.size) == (want.dtype, want.size), f"{what}: {got.dtype}{got.shape} for {want.shape}"
    differ = np.flatnonzero(words(got) != words(want))
    if differ.size:
        i = differ[0]
        raise AssertionError(
            f"{what}: {differ.size} of {math.prod(want.shape)} differ, first at {i}: "
            f"{got.reshape(-1)[i]!r} for {want.reshape(-1)[i]!r}"
        )


def assert_states_agree(
    rule: str, names: tuple[str, ...], got: list[dict[str, np.ndarray]], state: dict[str, Any]
) -> None:
    for role, name, have, want in zip(STATES[rule], names, got, stored(rule, names, state), strict=False):
        for key, array in want.items():
            view = BF16 if name == "bf16" else array.dtype
            assert_same_bits(have[key].view(view), array.view(view), f"{role}.{key}")
