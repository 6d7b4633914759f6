"""What classes here are given in the words of other libraries, and what each word means, or why it is refused."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from typing import Any

BITS = {32: "f32", 8: "dynamic8", 4: "q4"}
"""bitsandbytes' `optim_bits`, and ours of 4, as the codec of every state."""
TOLD: set[str] = set()
"""What has been said in this process."""
REMOVED = {
    "percentile_clipping": (100, "bitsandbytes 0.50 removed it, and 100 means off; clip_grad_norm_ clips"),
    "block_wise": (True, "bitsandbytes 0.50 removed it; scales are of blocks always"),
    "skip_zeros": (False, "gradients are dense: each element is stepped"),
}
"""Arguments of older bitsandbytes: the value that means what is done here, and a word on any other."""


def once(key: str, text: str) -> None:
    """A UserWarning the first time in a process, at the line outside of torch and this package that led to it."""
    if key in TOLD:
        return
    TOLD.add(key)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("refopt_cuda.", "torch.")):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def usual(call: str, kept: str | None, optim_bits: Any) -> str | None:
    """The codec of the states: the class's own, or that of `optim_bits`. ValueError where they disagree.

    kept  the codec behind the class's name; None for a plain name, whose states `optim_bits` may choose
    """
    if isinstance(optim_bits, bool) or optim_bits not in BITS:
        raise ValueError(f"{call}: optim_bits must be 32, 8 or 4, got {optim_bits!r}")
    if kept is None:
        return BITS[optim_bits]
    bits = {"f32": 32, "q4": 4}.get(kept, 8)
    if optim_bits not in (32, bits):  # 32 is what bitsandbytes' classes of 8 bits have as their default
        raise ValueError(f"{call}: optim_bits must be {bits}, as the name says, got {optim_bits}")
    return kept


def settings(call: str, given: Mapping[str, Any], args: Any = None, is_paged: Any = False) -> dict[str, Any]:
    """The options that are ours among those given. Words without effect here are taken off; ValueError for a word that
    asks for something else."""
    if args is not None:
        raise ValueError(f"{call}: args must be None, got {args!r}; give optim_bits and min_8bit_size themselves")
    out = dict(given)
    for name, (neutral, why) in REMOVED.items():
        if name not in out:
            continue
        value = out.pop(name)
        if value is not None and value != neutral:
            raise ValueError(f"{call}: {name} must be {neutral!r} or left out, got {value!r}: {why}")
        once(name, f"{call}: {name} has no effect and can be left out: {why}")
    if not isinstance(is_paged, bool):
        raise ValueError(f"{call}: is_paged must be True or False, got {is_paged!r}")
    if is_paged:
        out.setdefault("place", "paged")
    return out


SAME: Mapping[str, Mapping[str, str]] = {
    "signum": {"momentum": "beta"},
    "adafactor": {"d": "clip_threshold", "beta2_decay": "decay_rate"},
}
"""By rule: arguments of its class that groups hold under another name."""
OF_CLASS = ("place", "is_paged", "args", "path", "page_bytes", "resident_bytes", "during_backward", "delay", "warm")
"""Arguments that no group can have alone."""


def group(call: str, given: Mapping[str, Any], stem: str = "") -> dict[str, Any]:
    """A parameter group under the names that groups here have: what a class takes by another word, and bitsandbytes'
    words, mean the same in a group. ValueError for what no group can have alone, and for what is said twice."""
    out = dict(given)
    for name in OF_CLASS:
        if out.get(name) not in (None, False):
            raise ValueError(f"{call}: {name} is of the whole optimizer, not of a group, got {out[name]!r}")
    if "optim_bits" in out:
        out["optim_bits"] = usual(call, None, out["optim_bits"])
    for theirs, ours in {"optim_bits": "codecs", "min_8bit_size": "min_size", **SAME.get(stem, {})}.items():
        if theirs in out and ours in out:
            raise ValueError(f"{call}: a group has {theirs} and {ours}, which say the same; give one of them")
        if theirs in out:
            out[ours] = out.pop(theirs)
    return settings(call, out)


def refuse(call: str, **asked: tuple[Any, Any, str]) -> None:
    """ValueError for the first of these (given, the one value there is, why) that differs."""
    for name, (value, only, why) in asked.items():
        if value != only:
            raise ValueError(f"{call}: {name} must be {only!r}, got {value!r}: {why}")


SCALING: Mapping[str, Any] = {"max_grad_norm": None, "gnorm_scale": 1.0}
LIVE: Mapping[str, Any] = {**SCALING, "capturable": False}
"""Arguments of classes that scale and clip gradients, and of those whose steps a CUDA graph captures; defaults."""
REFUSED = {
    "differentiable": "no kernel records its step for autograd",
    "capturable": "the host counts the steps from one projection to the next, which a CUDA graph cannot repeat",
}
"""Arguments that not every class takes, and why."""


def further(call: str, given: Mapping[str, Any], takes: Mapping[str, Any], args: Any = None) -> dict[str, Any]:
    """The arguments that a class `takes` by keyword, at their defaults where they are not given.

    `foreach` and `fused` mean nothing here. ValueError for what only other classes do, TypeError for words that mean
    something nowhere.
    """
    found = settings(call, given, args)
    for name in found.keys() - takes.keys():
        if found[name] and name in REFUSED:
            raise ValueError(f"{call}: {name}={found[name]!r}: {REFUSED[name]}")
        if name not in (*REFUSED, "foreach", "fused"):
            more = f"; it takes {', '.join(takes)} besides those of its signature" if takes else ""
            raise TypeError(f"{call}: no argument {name!r}{more}")
    return {name: found.get(name, usual) for name, usual in takes.items()}


def size(call: str, min_8bit_size: Any) -> int:
    """The limit below which states stay float32. ValueError for what is no whole number >= 0."""
    if isinstance(min_8bit_size, bool) or not isinstance(min_8bit_size, int) or min_8bit_size < 0:
        raise ValueError(f"{call}: min_8bit_size must be a whole number >= 0, got {min_8bit_size!r}")
    return min_8bit_size
