"""torch's own database of optimizers (torch.testing._internal.common_optimizers) over the classes of this package.

`python -m tests.optim.torch_database` writes docs/torch_database.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.testing._internal import common_optimizers

import refopt_cuda as rc

PAGE = Path(__file__).parents[2] / "docs" / "torch_database.md"
STEPS = 20
ULPS = 4
"""Of weights between 1 and 3, after 20 steps. torch takes m + (1 - beta)(g - m) for the mean, in whose place the rule
here has beta m + (1 - beta) g: the last bits differ, and with them those of some weights."""
MATRIX = 2e-2
"""Of the distance that Muon moves a matrix: torch multiplies in bfloat16, the CPU path here in float32."""


class Ours(NamedTuple):
    """The class of the same semantics, and what it is given besides."""

    cls: Any
    more: dict[str, Any]


OURS = {
    "SGD": Ours(rc.optim.SGD, {}),
    "Adam": Ours(rc.optim.Adam, {}),
    "AdamW": Ours(rc.optim.AdamW, {}),
    "RMSprop": Ours(rc.optim.RMSprop, {}),
    "Adagrad": Ours(rc.optim.Adagrad, {}),
    "Adafactor": Ours(rc.optim.Adafactor, {"variant": "torch", "lr": 1e-2}),
    "Muon": Ours(rc.optim.Muon, {}),
}
LEFT_OUT = dict.fromkeys(("Adadelta", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop"), "no such rule here")
LEFT_OUT |= {
    "LBFGS": "steps by a history of whole gradients and calls its closure several times",
    "SparseAdam": "sparse gradients are refused",
}
TAKEN = {
    "lr as a Tensor is not supported for capturable=False and foreach=True": "taken: there is one way for all, and it "
    "reads a rate in a tensor",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "taken, likewise",
    "betas must be either both floats or both Tensors": "taken: each is read by itself",
}
"""Error inputs that are no error here, by torch's message, and why."""


class Entry(NamedTuple):
    """An input of the database: whose, what it is called, and its arguments."""

    name: str
    desc: str
    words: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.name}: {self.desc}"


class Fault(NamedTuple):
    """An error input: arguments, and what torch raises and says."""

    name: str
    params: Any
    words: dict[str, Any]
    error: Any
    message: str
    at_step: bool

    def __str__(self) -> str:
        return f"{self.name}: {self.message}"


def infos() -> dict[str, Any]:
    return {info.optim_cls.__name__: info for info in common_optimizers.optim_db}


def entries(device: str = "cuda") -> list[Entry]:
    """All inputs of the optimizers that have an equivalent; those for a GPU are more than those for a CPU."""
    found = []
    for name, info in infos().items():
        for given in info.optim_inputs_func(device=device) if name in OURS else ():
            found.append(Entry(name, given.desc or "default", given.kwargs))
    return found


def faults() -> Iterator[Fault]:
    """All error inputs of the same."""
    for name, info in infos().items():
        for given in info.optim_error_inputs_func(device="cpu", dtype=torch.float32) if name in OURS else ():
            what = given.optimizer_error_input
            late = given.error_on is common_optimizers.OptimizerErrorEnum.STEP_ERROR
            yield Fault(name, what.params, what.kwargs, given.error_type, given.error_regex, late)


def shapes(name: str) -> list[tuple[int, ...]]:
    return [(8, 20), (30, 16)] if name == "Muon" else [(8, 20), (30,), (), (3, 4, 5)]


def run(cls: Any, words: dict[str, Any], name: str, device: str) -> list[torch.Tensor]:
    """Weights after `STEPS` steps from weights in [1, 3), gradients of all sizes; one parameter misses a step."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter((1 + 2 * torch.rand(s, generator=generator)).to(device)) for s in shapes(name)]
    given = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in words.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = cls(params, **given)
    for t in range(STEPS):
        for k, p in enumerate(params):
            size = 10 ** (4 * torch.rand(p.shape, generator=generator) - 4)
            g = (size * torch.randn(p.shape, generator=generator).sign()).to(device)
            p.grad = None if t == 2 and k == 1 else g
        opt.step()
    return [p.detach().cpu() for p in params]


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """The most float32 numbers that lie between two weights."""
    one, other = (x.numpy().reshape(-1).view(np.int32).astype(np.int64) for x in (a, b))
    return int(np.abs(one - other).max(initial=0))


def distance(entry: Entry, device: str = "cpu") -> float:
    """How far the two classes end from each other: ulps of weights, for Muon a share of the way that torch went."""
    ours = OURS[entry.name]
    mine = run(ours.cls, ours.more | entry.words, entry.name, device)
    words = plainly(entry.words) if device == "cpu" and "capturable" in entry.words else entry.words
    theirs = run(infos()[entry.name].optim_cls, words, entry.name, device)
    if entry.name != "Muon":
        return max(ulps(a, b) for a, b in zip(mine, theirs, strict=True))
    start = run(infos()[entry.name].optim_cls, {"lr": 0.0, "weight_decay": 0.0}, entry.name, device)
    pairs = zip(mine, theirs, start, strict=True)
    return max(float((a - b).norm() / (b - c).norm()) for a, b, c in pairs)


def plainly(words: dict[str, Any]) -> dict[str, Any]:
    """The same numbers without `capturable` and tensors, which torch takes together and on a GPU alone."""

    def number(x: Any) -> Any:
        return x.item() if isinstance(x, torch.Tensor) else tuple(map(number, x)) if isinstance(x, tuple) else x

    return {name: number(value) for name, value in words.items() if name != "capturable"}


def refused(fault: Fault) -> tuple[str, str]:
    """What the class here makes of an error input: ("refused", its sentence) or ("taken", the first warning)."""
    ours = OURS[fault.name]
    params = fault.params
    if params is None:
        params = [torch.nn.Parameter(torch.ones(2, 3))]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            opt = ours.cls(params, **(ours.more | fault.words))
            for p in (p for group in opt.param_groups for p in group["params"]):
                p.grad = torch.ones_like(p)
            opt.step()
        except (ValueError, TypeError, RuntimeError) as error:
            return "refused", f"{type(error).__name__}: {error}"
    return "taken", str(said[0].message) if said else ""


def page() -> str:
    """The page of the documentation."""
    version = torch.__version__.partition("+")[0]
    lines = [
        "# torch's database of optimizers",
        "",
        "PyTorch tests its own optimizers over a database of inputs, `torch.testing._internal.common_optimizers`",
        f"(here that of torch {version}). Every input of an optimizer that has an equivalent here runs through both",
        f"classes: weights in [1, 3), {STEPS} steps, gradients of 1e-4 to 1. No weight may end more than {ULPS}",
        f"float32 numbers apart, no matrix that Muon moves more than {MATRIX:g} of the way.",
        "Inputs with `capturable` are those for a GPU: on a CPU, where torch refuses them, torch's class gets the same",
        "numbers without it. `python -m tests.optim.torch_database` writes this page.",
        "",
        "| torch.optim | input | arguments |",
        "|---|---|---|",
    ]
    for e in entries():
        words = ", ".join(f"`{k}={_shown(v)}`" for k, v in e.words.items()) or "none"
        lines.append(f"| {e.name} | {e.desc} | {words} |")
    lines += ["", "Left out:", "", "| torch.optim | why |", "|---|---|"]
    lines += [f"| {name} | {why} |" for name, why in LEFT_OUT.items()]
    lines += ["", "What torch refuses, and what becomes of it here:", ""]
    lines += ["| torch.optim | torch says | here |", "|---|---|---|"]
    said: dict[str, list[str]] = {}
    for f in faults():
        said.setdefault(f.message, []).append(f.name)
    for message, names in said.items():
        whose = "all" if set(names) == set(OURS) else ", ".join(dict.fromkeys(names))
        lines.append(f"| {whose} | `{message.replace('|', chr(92) + '|')}` | {TAKEN.get(message, 'refused')} |")
    return "\n".join([*lines, ""])


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    return f"tensor({value.item():g})" if isinstance(value, torch.Tensor) and value.numel() == 1 else repr(value)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
