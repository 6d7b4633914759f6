"""Hypothesis strategies: shapes with ragged tails, magnitudes over eighteen decades, zeros, outliers.

At magnitude 1 an eps inside the root cannot be told from one outside, so sizes are log-uniform from 1e-12 to 1e6.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
from hypothesis import strategies as st

f32: Any = np.float32  # called on lists too, which NumPy's stubs do not know
Array = np.ndarray
BLOCKS = (4, 16, 64)
"""Small blocks, each dividing the next, so that small tensors have many blocks, pages and tails."""

SHAPES = [(), (0,), (3, 0), (1,), (2,), (31,), (64,), (129,), (5, 3), (3, 40), (2, 100), (2, 3, 17)]
FULL = [s for s in SHAPES if 0 not in s]
KINDS = ["plain", "plain", "zeros", "outlier", "all zero"]


def log_uniform(rng: np.random.Generator, shape: tuple[int, ...], low: float, high: float) -> Array:
    """Either sign, sizes from 10^low to 10^high."""
    return np.asarray(rng.choice([-1.0, 1.0], shape) * 10 ** rng.uniform(low, high, shape), f32)


def planted(x: Array, kind: str, rng: np.random.Generator) -> Array:
    """`x` with zeros of both signs, one outlier in 16, or nothing but zeros."""
    flat = x.reshape(-1)
    if kind == "zeros":
        flat[rng.random(flat.size) < 0.4] = 0.0
        flat[rng.random(flat.size) < 0.1] = -0.0
    elif kind == "outlier" and flat.size:
        flat[rng.integers(flat.size, size=-(-flat.size // 16))] *= f32(1e4)
    elif kind == "all zero":
        flat[:] = 0
    return x


@st.composite
def arrays(
    draw: st.DrawFn, shapes: Any = SHAPES, low: float = -12, high: float = 6, kinds: Any = KINDS, signed: bool = True
) -> Array:
    """One float32 array."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    a = draw(st.floats(low, high))
    b = draw(st.floats(a, high))
    x = planted(log_uniform(rng, draw(st.sampled_from(shapes)), a, b), draw(st.sampled_from(kinds)), rng)
    return x if signed else np.abs(x)


@st.composite
def runs(
    draw: st.DrawFn, steps: int = 3, shapes: Any = SHAPES, low: float = -12, high: float = 6, kinds: Any = KINDS
) -> tuple[Array, list[Array]]:
    """Weights of ordinary size and the gradients of a few steps, all of one shape."""
    p = draw(arrays([draw(st.sampled_from(shapes))], -3, 1, ["plain", "zeros"]))
    return p, [draw(arrays([p.shape], low, high, kinds)) for _ in range(steps)]


@st.composite
def assignments(
    draw: st.DrawFn, states: tuple[str, ...], stems: Any = ("f32", "bf16", "int8_linear", "dynamic8")
) -> Any:
    """(codec, block) for every state: any mixture, blocks that divide one another."""
    return {s: (draw(st.sampled_from(stems)), draw(st.sampled_from(BLOCKS))) for s in states}


def records(ref: ModuleType, assignment: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """The subject's codecs for a drawn assignment."""
    table = ref.codecs.CODECS
    return {
        s: table[name](block=b) if table[name].scope == "block" else table[name] for s, (name, b) in assignment.items()
    }


def follow(opt: Any, p: Any, grads: Any, state: Any = None) -> tuple[Any, Any]:
    """Run an Optimizer over a list of gradients from its initial state."""
    state = opt.init(p) if state is None else state
    for g in grads:
        p, state = opt.step(p, g, state)
    return p, state
