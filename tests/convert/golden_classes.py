"""Checkpoints that must load for ever, of the classes that are no rule of elements, with every codec of states.

`python -m tests.convert.golden_classes` writes tests/convert/checkpoints/FORMAT/classes/CLASS.pt.gz; as with
`golden.py`, a file that is there is never written again. States are those of the class after two steps on a CPU, which
other tests hold to the reference; the third step is stored with them.
"""

from __future__ import annotations

import copy
import sys
import warnings
from typing import Any

import torch

import refopt_cuda as rc
from refopt_cuda.optim import states
from tests.convert.golden import BLOCK, FOLDER, SHAPE, STATES, write
from tests.optim.pairs import gradient, parameter, weights

WORDS: dict[str, dict[str, Any]] = {
    "LAMB": {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.06},
    "LARS": {"lr": 0.7, "momentum": 0.85, "weight_decay": 0.07, "trust_coefficient": 0.02},
    "Adafactor": {"lr": 0.02, "relative_step": False, "beta1": 0.8},
    "CAME": {"lr": 0.003, "betas": (0.8, 0.97, 0.995)},
    "AdamMini": {"lr": 0.013, "betas": (0.8, 0.97), "weight_decay": 0.11},
    "Muon": {"lr": 0.02, "momentum": 0.85, "weight_decay": 0.3},
    "SM3": {"lr": 0.07, "momentum": 0.85},
    "GaLoreAdamW": {"lr": 0.013, "betas": (0.8, 0.97), "rank": 2, "update_proj_gap": 2},
    "APOLLOAdamW": {"lr": 0.013, "betas": (0.8, 0.97), "rank": 2, "seed": 5},
    "ScheduleFreeAdamW": {"lr": 0.013, "betas": (0.8, 0.97), "warmup_steps": 3, "weight_decay": 0.06},
}
PRODUCTS = ("Muon", "GaLoreAdamW", "APOLLOAdamW")
"""Classes whose steps hold matrix products, of which the last bits are each machine's own."""


def make(name: str, codec: str, p: Any) -> Any:
    """The class with all its codable states in one codec."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(rc.optim, name)([p], codecs=codec, block=BLOCK, min_8bit_size=0, **WORDS[name])


def made(name: str, codec: str) -> dict[str, Any]:
    """One combination's checkpoint, and the step after it."""
    (p,) = weights([SHAPE], torch.float32, "cpu", seed=7)
    opt = make(name, codec, p)
    for t in range(2):
        p.grad = gradient(p, t)
        opt.step()
    out = {"p": p.detach().clone(), "optimizer": copy.deepcopy(opt.state_dict()), "g": gradient(p, 2)}
    p.grad = out["g"].clone()
    opt.step()
    return out | {"p_next": p.detach().clone(), "state_next": copy.deepcopy(dict(opt.state[p]))}


def resumed(name: str, codec: str, kept: dict[str, Any], device: str = "cpu") -> Any:
    """The class, with a stored checkpoint loaded."""
    opt = make(name, codec, parameter(kept["p"].clone(), torch.float32, device))
    opt.load_state_dict(kept["optimizer"])
    return opt


def main() -> int:
    return write(FOLDER / str(states.FORMAT) / "classes", WORDS, STATES, made)


if __name__ == "__main__":
    sys.exit(main())
