"""Whether steps can move weights that are rounded to bfloat16: reported once, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from refopt.spec import Rule
from refopt_cuda.optim.dialect import TOLD, once

UNIT = ("adam", "adamw", "lion", "signum")
"""Rules whose update of a weight is at most about as long as lr, whatever the gradient."""
SAMPLE = 64
"""Weights that are looked at in each parameter."""


def held(w: torch.Tensor, lr: float) -> torch.Tensor:
    """Which of these weights (bfloat16) no update of length `lr` can change: it is below half the distance to the next
    number, and rounding to the nearest takes it back. Bool, of w's shape."""
    mantissa, exponent = torch.frexp(w.double().abs())
    exponent = torch.where(mantissa == 0, -125, exponent)
    half = torch.ldexp(torch.ones_like(mantissa), exponent.clamp(min=-125) - 9)
    half = torch.where((mantissa == 0.5) & (exponent > -125), half / 2, half)  # below a power of two they lie closer
    return lr < half * (1 - 2.0**-15)  # the sum is rounded to float32 first


def check(rule: Rule, groups: Sequence[Mapping[str, Any]], call: str) -> None:
    """Warn, once in a process, where more than half of a sample of a group's bfloat16 weights would be held.

    Runs when groups are made, never in a step; on a GPU it waits for the device. lr is that of the group, before any
    schedule; of rules whose updates follow the gradient's size nothing is said.
    """
    if rule.stem not in UNIT or "bf16" in TOLD:
        return
    for group in groups:
        lr = group["lr"]
        if group["codecs"].get("p") is not None or isinstance(lr, torch.Tensor) or not lr:
            continue
        params = [p.detach() for p in group["params"] if p.dtype == torch.bfloat16 and _looks(p)]
        if not params:
            continue
        sample = torch.cat([_sample(p) for p in params if p.device == params[0].device])
        share = float(held(sample, lr).float().mean())
        if share > 0.5:
            once(
                "bf16",
                f"{call}: an update as long as lr = {lr:g} cannot move {share:.0%} of these bfloat16 weights: it is "
                "less than half of what their last bit is worth, and rounding takes it back. Keep the rest of them: "
                "codecs={'p': 'bf16_rem16'} (exact, 2 bytes a weight), or round by chance: codecs={'p': 'bf16_sr'}",
            )


def _looks(p: torch.Tensor) -> bool:
    plain = type(p) in (torch.Tensor, torch.nn.Parameter) and p.device.type in ("cpu", "cuda")
    return plain and p.numel() > 0 and p.is_contiguous()


def _sample(p: torch.Tensor) -> torch.Tensor:
    flat = p.view(-1)
    return flat[:: -(-flat.numel() // SAMPLE)]
