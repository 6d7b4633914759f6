"""Comparison by bits: float32 words, every NaN as one value, and a message that carries the first difference."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray


def words(a: Array) -> Array:
    """The array's bits as unsigned integers, every NaN as one value."""
    a = np.ascontiguousarray(a)
    bits = a.reshape(-1).view(f"u{a.dtype.itemsize}").copy()
    if a.dtype.kind == "f":
        bits[np.isnan(a.reshape(-1))] = np.iinfo(bits.dtype).max
    return bits


def same_bits(got: Any, want: Any, what: str) -> None:
    """Assert that two arrays have one dtype, shape and pattern of bits."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape), (
        f"{what}: {got.dtype}{got.shape} for {want.dtype}{want.shape}"
    )
    differ = np.flatnonzero(words(got) != words(want))
    if differ.size:
        i = int(differ[0])
        raise AssertionError(
            f"{what}: {differ.size} of {got.size} differ, first at {i}: "
            f"{got.reshape(-1)[i]!r} for {want.reshape(-1)[i]!r}"
        )


def parts(stored: Any) -> dict[str, Array]:
    """The arrays of a stored state: a Box's, or the plain array under one name."""
    return getattr(stored, "arrays", None) or {"codes": stored}


def same_state(got: dict[str, Any], want: dict[str, Any], what: str = "state") -> None:
    """Assert that two states of one tensor agree: the step count, the roles, and every stored array."""
    assert got.keys() == want.keys(), f"{what}: roles {sorted(got)} for {sorted(want)}"
    assert got.get("t") == want.get("t"), f"{what}: t={got.get('t')} for {want.get('t')}"
    for role in got.keys() - {"t"}:
        a, b = parts(got[role]), parts(want[role])
        assert a.keys() == b.keys(), f"{what}[{role!r}]: {sorted(a)} for {sorted(b)}"
        for name in a:
            same_bits(a[name], b[name], f"{what}[{role!r}].{name}")


def unsigned_zero(a: Array) -> Array:
    """The array with -0 as +0, for laws that hold for values and not for the sign of zero."""
    return a + np.zeros((), a.dtype)
