"""Codes beside the nearest ones: is the table known, is the scale its block's largest, is each code the nearest?"""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt.codecs import dynamic8, q4
from refopt.codecs.compand8 import table as companded
from refopt.conform.measure import Step
from refopt.conform.record import Run, Taken
from refopt.conform.target import Coded
from refopt.spec import Array

f32 = np.float32
CLOSE = 2.0**-18
"""How near a midpoint a code is undecided: a few units of the last place of what is coded."""

Found = tuple[str, str, str]
"""(status, id, text)."""


def tables() -> dict[str, Array]:
    """The values of the codes that refopt has, by name."""
    out: dict[str, Array] = {}
    for name, codec in (("dynamic8", dynamic8), ("q4", q4)):
        for sign in (True, False):
            out[f"{name} {'signed' if sign else 'unsigned'}"] = values(codec(signed=sign, block=256))
    bent = np.roll(companded(True), 128)
    bent[0] = np.nan  # -128 is never written
    return out | {"compand8 signed": bent, "compand8 unsigned": companded(False) ** 2}


def values(codec: Any) -> Array:
    """What each code decodes to under a scale of one."""
    every = np.arange(256 if codec.stem == "dynamic8" else 16)
    box = codec.encode(np.ones(every.size, f32), block=every.size)
    codes = every if codec.stem == "dynamic8" else (every[0::2] << 4) | every[1::2]
    box.arrays["codes"] = codes.astype(np.uint8).reshape(box.codes.shape)
    return box.decode()


def named(table: Array) -> str:
    """The codec of refopt whose values these are, to the bit or nearly; "" if there is none."""
    for name, known in tables().items():
        if known.size == table.size and np.allclose(
            np.sort(table), np.sort(known), rtol=2e-6, atol=1e-9, equal_nan=True
        ):
            exact = np.array_equal(np.sort(table), np.sort(known), equal_nan=True)
            return name if exact else f"{name} (its values to {ulp_of(table, known)} ulps)"
    finite = table[np.isfinite(table)]
    return "fp8 e4m3" if table.size == 256 and finite.max(initial=0) == 448 else ""


def ulp_of(table: Array, known: Array) -> int:
    a, b = np.sort(table), np.sort(known)
    return int(np.ceil(np.nanmax(np.abs((a - b).astype(np.float64) / np.spacing(np.fmax(np.abs(b), f32(1e-30)))))))


def judge(run: Run, step: Step) -> list[Found]:
    """What is wrong with the codes of a run, or that nothing is: one answer for each state that is coded."""
    out: dict[str, Found] = {}
    counts: dict[str, list[int]] = {}
    for taken in run.steps:
        if not taken.codes or taken.before is None:
            continue
        _, fresh = step(taken.p, taken.g, taken.before, taken.t)
        for n, c in taken.codes.items():
            if n in out or n not in fresh:
                continue
            judge_one = bent if named(c.table).startswith("compand8") else one
            bad, masked, size = judge_one(taken, n, c, fresh[n].reshape(-1))
            if bad:
                out[n] = bad
            seen = counts.setdefault(n, [0, 0])
            seen[0], seen[1] = seen[0] + masked, seen[1] + size
    names = {n: named(c.table) or "a table of its own" for taken in run.steps for n, c in taken.codes.items()}
    good = [n for n in counts if n not in out]
    found = list(out.values())
    if good:
        parts = [f"{n}: {names[n]}, nearest codes, {counts[n][0]} of {counts[n][1]} decided by rounding" for n in good]
        found.append(("pass", "", "; ".join(parts)))
    return found


def one(taken: Taken, n: str, c: Coded, x: Array) -> tuple[Found | None, int, int]:
    """The codes of one state of one step: (what is wrong, elements that rounding decides, elements)."""
    top = float(np.nanmax(np.abs(np.where(np.isfinite(c.table), c.table, 0))))
    codes, size = c.codes[: x.size], x.size
    starts = np.arange(0, size, c.block)
    largest = np.maximum.reduceat(np.abs(x).astype(np.float64), starts)
    want = largest / top
    where = f"step {taken.t}, tensor {taken.k}, {n}"
    off = np.abs(c.scales[: want.size] - want) > want * 2.0**-19 + 2.0**-140
    if off.any():
        b = int(np.flatnonzero(off)[0])
        return ("fail", *scale_says(c.scales, want, b, where)), 0, size
    with np.errstate(all="ignore"):
        y = x / np.repeat(want, np.diff([*starts, size]))
    y = np.where(np.isfinite(y), y, 0.0)
    order = np.argsort(np.where(np.isfinite(c.table), c.table, np.inf), kind="stable")
    sorted_values = c.table[order].astype(np.float64)
    known = sorted_values[np.isfinite(sorted_values)]
    got = c.table[codes].astype(np.float64)
    mid = (known[:-1] + known[1:]) / 2
    best = known[np.searchsorted(mid, y)]
    worse = np.abs(got - y) - np.abs(best - y)
    apart = worse > 0
    slack = CLOSE * np.abs(y)
    live = np.repeat(want > 0, np.diff([*starts, size]))
    wrong = apart & (worse > slack) & live
    if not wrong.any():
        return None, int((apart & live).sum()), size
    return ("fail", *code_says(y, got, best, wrong, where)), int(apart.sum()), size


def bent(taken: Taken, n: str, c: Coded, x: Array) -> tuple[Found | None, int, int]:
    """The same for codes that are even steps of a bent scale, with scales of float16: `codecs.compand8`."""
    signed, starts = bool(np.isnan(c.table).any()), np.arange(0, x.size, c.block)
    x = x.astype(np.float64) if signed else np.sqrt(x.astype(np.float64))
    largest = np.maximum(np.maximum.reduceat(np.abs(x), starts), 1e-12)
    scales = c.scales.astype(np.float64) if signed else np.sqrt(c.scales.astype(np.float64))
    where = f"step {taken.t}, tensor {taken.k}, {n}"
    off = np.abs(scales - largest) > largest * 2.0**-10.9 + 2.0**-24.9
    if off.any():
        half = largest.astype(np.float16).astype(np.float64)
        return ("fail", *scale_says(scales, half, int(np.flatnonzero(off)[0]), where)), 0, x.size
    y = x / np.repeat(largest, np.diff([*starts, x.size]))
    z = 127 * 2 * y / (1 + np.abs(y)) if signed else 255 * y
    q = c.codes[: x.size].astype(np.float64) - (128 if signed else 0)
    wrong = np.abs(q - z) > 0.5 + 1e-3
    if wrong.any():
        i = int(np.argmax(wrong))
        text = f"{where}[{i}]: {z[i]:.6g} steps of the bent scale are stored as {q[i]:g}; {wrong.mean():.2%} of codes"
        return ("fail", "codes-not-nearest", text), 0, x.size
    return None, int((np.abs(q - z) > 0.5 - 1e-3).sum()), x.size


def scale_says(scales: Array, want: Array, b: int, where: str) -> tuple[str, str]:
    """A scale that is not its block's largest magnitude: whose is it?"""
    got = float(scales[b])
    shown = f"{where}: the scale of block {b} is {got:.6g}, its largest magnitude {want[b]:.6g}"
    if any(abs(got - want[j % want.size]) <= want[j % want.size] * 1e-6 for j in (b - 1, b + 1)):
        return "scale-of-neighbour", f"{shown}: that is a neighbour's"
    if rounded_to_half(scales, want):
        return "scale-float16", f"{shown}: scales are kept in float16"
    if want[b] < got <= 1.0001e-12:
        return "scale-floor", f"{shown}: scales have a floor"
    if got < want[b]:
        return "scale-too-small", shown
    return "scale-differs", shown


def rounded_to_half(scales: Array, want: Array) -> bool:
    """Whether every scale, or its root where values are squares, is a float16 beside its block's largest magnitude."""
    for power in (1.0, 0.5):
        got, best = (x[: want.size].astype(np.float64) ** power for x in (scales, want))
        with np.errstate(over="ignore"):
            half = got.astype(np.float16).astype(np.float64)
        if (np.abs(half - got) <= got * 1e-6).all() and (np.abs(half - best) <= best * 2.0**-10 + 2.0**-24).all():
            return True
    return False


def code_says(y: Array, got: Array, best: Array, wrong: Array, where: str) -> tuple[str, str]:
    """Codes that are not the nearest: how many, how far, and whether they lean one way."""
    i, share = int(np.argmax(wrong * np.abs(got - y))), float(wrong.mean())
    shown = f"{where}[{i}]: {y[i]:.9g} is stored as {got[i]:.9g}, nearest is {best[i]:.9g}; {share:.2%} of codes"
    zeros = wrong & (y == 0)
    if zeros.any():
        shown += f"; {int(zeros.sum())} zeros among them"
    small = np.abs(got[wrong]) < np.abs(best[wrong])
    sign = (np.sign(got[wrong]) != np.sign(y[wrong])) | (best[wrong] == 0)
    if sign.all():
        return "sign-kept-at-zero", f"{shown}, all beside zero: no code of another sign is used"
    if small.all() and share > 0.05:
        return "codes-truncated", f"{shown}, all toward zero"
    return "codes-not-nearest", shown
