"""Checkpoints that must load for ever: every element rule with every codec and every format of weights.

`python -m tests.convert.golden` writes tests/convert/checkpoints/FORMAT/RULE.pt.gz; a file that is there is never
written again, so a new checkpoint format gets a folder of its own beside the old one. The states are those of the NumPy
reference after two steps, laid out as `state_dict()` has them; the third step is stored with them.
"""

from __future__ import annotations

import copy
import gzip
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.convert.walk import places
from refopt_cuda.optim import states
from tests.optim.pairs import exact, gradient, parameter, record, stored, weights

FOLDER = Path(__file__).parent / "checkpoints"
SHAPE = (3, 24)
BLOCK = 16
WORDS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.03, "momentum": 0.85, "weight_decay": 0.07, "dampening": 0.2},
    "adam": {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.06},
    "adamw": {"lr": 0.013, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.11, "amsgrad": True},
    "lion": {"lr": 0.003, "betas": (0.85, 0.95), "weight_decay": 0.2},
    "rmsprop": {"lr": 0.013, "alpha": 0.96, "eps": 1e-7, "momentum": 0.85, "centered": True},
    "adagrad": {"lr": 0.013, "initial_accumulator_value": 0.003, "eps": 1e-7},
    "signum": {"lr": 0.003, "beta": 0.85, "weight_decay": 0.2},
    "ademamix": {"lr": 0.013, "betas": (0.8, 0.97, 0.995), "alpha": 3.5, "t_alpha": 3, "t_beta3": 5},
}
STATES = ["f32", "bf16", "int8_linear", "dynamic8", "fp8", "fp8.e5m2", "q4", "compand8", "compand8.bf16"]
WEIGHTS = ["bf16_sr", "bf16_kahan", "bf16_rem16", "bf16_ecc", "bf16_ecc.16"]
SEED = 5


def make(rule: str, codec: str, p: Any) -> Any:
    """The drop-in of one combination."""
    codecs = {"p": codec} if codec in WEIGHTS else codec
    return rc.optim.Composed([p], rule, codecs, block=BLOCK, min_size=0, seed=SEED, **WORDS[rule])


def first(codec: str) -> Any:
    (p,) = weights([SHAPE], torch.bfloat16 if codec in WEIGHTS else torch.float32, "cpu", seed=7)
    return p


class Reference:
    """One parameter in the NumPy reference, with the state of a drop-in's entry."""

    def __init__(self, rule: str, codec: str, opt: Any, p: Any) -> None:
        names = [s.name for s in refopt.rules.RULES[rule].states]
        if codec in WEIGHTS:
            given = {"p": record(codec)}
        else:
            given = {name: record(codec, BLOCK) for name in names}
        self.opt = refopt.Optimizer(rule, given, seed=SEED, **reference(WORDS[rule]))
        self.p, self.dtype, self.kept = exact(p), p.dtype, opt
        self.state = self.opt.init([self.p])[0]

    def step(self, g: torch.Tensor) -> None:
        self.p, self.state = self.opt._apply(0, self.p, exact(g), self.state, self.opt.hyper)
        self.p = torch.from_numpy(self.p).to(self.dtype).float().numpy()

    def entry(self) -> dict[str, Any]:
        """The state as `opt.state[p]` holds it."""
        out: dict[str, Any] = {"step": self.state["t"]}
        for part, array in self._arrays():
            x = torch.from_numpy(np.ascontiguousarray(array).copy())
            out[part.key] = x.view(part.dtype) if x.dtype == torch.uint16 else x
        return out

    def take(self, entry: dict[str, Any]) -> None:
        """Go on from an entry."""
        self.state["t"] = entry["step"]
        for part, array in self._arrays():
            np.copyto(array, stored(entry[part.key]))

    def _arrays(self) -> list[tuple[states.Part, np.ndarray]]:
        (place,) = places(self.kept)
        out = []
        for role, parts in zip(place.roles, place.layout.parts, strict=True):
            x = self.state[role]
            arrays = list(x.arrays.values()) if isinstance(x, refopt.Box) else [x]
            out += zip(parts, arrays, strict=True)
        if place.layout.beside:
            name = place.layout.beside.key.removeprefix("p.")
            out.append((place.layout.beside, self.state["p"].arrays[name]))
        return out


def reference(words: dict[str, Any]) -> dict[str, Any]:
    """The same hyper-parameters by the names that the reference knows."""
    new = {k if k != "initial_accumulator_value" else "init_acc": v for k, v in words.items()}
    if len(new.get("betas", ())) == 3:
        new |= dict(zip(("beta1", "beta2", "beta3"), new.pop("betas"), strict=True))
    return new


def made(rule: str, codec: str) -> dict[str, Any]:
    """One combination's checkpoint, and the step after it."""
    p = first(codec)
    opt = make(rule, codec, p)
    mirror = Reference(rule, codec, opt, p)
    for t in range(2):
        mirror.step(gradient(p, t))
    p.data.copy_(torch.from_numpy(mirror.p))
    saved = opt.state_dict()
    saved["state"][0] = mirror.entry()
    opt.load_state_dict(saved)
    out = {"p": p.detach().clone(), "optimizer": opt.state_dict(), "g": gradient(p, 2)}
    mirror.step(out["g"])
    return out | {"p_next": torch.from_numpy(mirror.p).to(p.dtype), "state_next": mirror.entry()}


def load(path: Path) -> dict[str, Any]:
    """The combinations of one file."""
    return torch.load(io.BytesIO(gzip.decompress(path.read_bytes())), weights_only=True)


def resumed(rule: str, codec: str, kept: dict[str, Any], device: str = "cpu") -> Any:
    """A drop-in that loaded a copy of a stored checkpoint."""
    opt = make(rule, codec, parameter(kept["p"].clone(), kept["p"].dtype, device))
    opt.load_state_dict(copy.deepcopy(kept["optimizer"]))
    return opt


def write(folder: Path, names: Iterable[str], codecs: Sequence[str], made: Callable[[str, str], Any]) -> int:
    """A file of each name with every codec; those that are there stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / f"{name}.pt.gz"
        if path.exists():
            print(f"{path} is there and stays")
            continue
        file = io.BytesIO()
        torch.save({codec: made(name, codec) for codec in codecs}, file)
        path.write_bytes(gzip.compress(file.getvalue(), 9, mtime=0))
        print(path, path.stat().st_size)
    return 0


def main() -> int:
    return write(FOLDER / str(states.FORMAT), WORDS, [*STATES, *WEIGHTS], made)


if __name__ == "__main__":
    sys.exit(main())
