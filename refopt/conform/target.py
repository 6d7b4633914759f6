"""What the suite asks of an optimizer. An adapter is a subclass: three methods, and as many more as it can answer."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from refopt.spec import Array, Rule

f32 = np.float32


class Coded(NamedTuple):
    """A state as the target stores it: one code an element, flat; a scale a block; the values of the codes."""

    codes: Array
    scales: Array
    table: Array
    block: int


def decoded(c: Coded) -> Array:
    """What codes stand for, flat."""
    return (c.table[c.codes] * np.repeat(c.scales, c.block)[: c.codes.size]).astype(f32)


class Target:
    """An optimizer under test.

    `start`, `step` and `params` are needed. The others have an answer that means "cannot be asked": then a level says
    so and is skipped, or compares whole runs instead of single steps. Arrays are float32, states have the names of the
    reference's record (`refopt.rules.adamw.states`).
    """

    name = "target"
    dtypes: tuple[str, ...] = ("float32",)
    place: str | None = None
    jumps = True
    """Whether `force` sets the count of steps too."""

    def refuses(self, rule: Rule, hyper: dict[str, Any]) -> list[str]:
        """Hyper-parameters that differ from the reference's default and cannot be passed on."""
        return []

    def start(self, rule: Rule, params: Sequence[Array], hyper: dict[str, Any], dtype: str = "float32") -> None:
        """Begin a run: the reference's hyper-parameters, weights of `dtype` ("float32" or "bfloat16")."""
        raise NotImplementedError

    def step(self, grads: Sequence[Array]) -> None:
        """One step of all parameters."""
        raise NotImplementedError

    def params(self) -> list[Array]:
        """The weights."""
        raise NotImplementedError

    def changed(self) -> list[str]:
        """What the last step wrote into that was not its own: "g"; for a pure function its other arguments too."""
        return []

    def state(self, k: int) -> dict[str, Array]:
        """The states of parameter k that can be read, decoded; {} where none can."""
        return {}

    def force(self, k: int, p: Array, state: dict[str, Array], t: int) -> bool:
        """Put weights, states and the number of steps made in the place of parameter k's; False if it cannot be."""
        return False

    def coded(self, k: int) -> dict[str, Coded]:
        """The states of parameter k that are stored as codes."""
        return {}

    def save(self) -> Any:
        """What a checkpoint of the optimizer holds, None if there is none."""
        return None

    def load(self, saved: Any) -> None:
        """Take the place of the optimizer that was saved; called after `start` with the same arguments."""

    def nbytes(self, k: int) -> int | None:
        """Bytes of the states of parameter k, None if unknown. Counters of one number do not count."""
        return None

    def resident(self) -> Target | None:
        """The same optimizer with its states where they always are: what a place is compared with."""
        return None


class FunctionalTarget(Target):
    """A pure optimizer: `init(p, **hyper) -> state`, `update(p, g, state, t=..., **hyper) -> (p, state)`.

    The state is a dict of arrays with the reference's names, as the reference's own rules have; whatever the functions
    do not take of the hyper-parameters is not passed on.
    """

    def __init__(self, init: Callable[..., dict[str, Array]], update: Callable[..., Any], name: str = "") -> None:
        self.init, self.update, self.name = init, update, name or getattr(update, "__qualname__", "functional")

    def refuses(self, rule: Rule, hyper: dict[str, Any]) -> list[str]:
        taken = accepted(self.update)
        return [] if taken is None else [n for n in moved(rule, hyper) if n not in taken]

    def start(self, rule: Rule, params: Sequence[Array], hyper: dict[str, Any], dtype: str = "float32") -> None:
        self.hyper = {n: x for n, x in hyper.items() if n in (accepted(self.update) or hyper)}
        self.ps, self.ts = [p.copy() for p in params], [0] * len(params)
        self.states: list[dict[str, Array]] = [self.init(p, **self._for(self.init)) for p in params]

    def _for(self, f: Callable[..., Any]) -> dict[str, Any]:
        taken = accepted(f)
        return {n: x for n, x in self.hyper.items() if taken is None or n in taken}

    def step(self, grads: Sequence[Array]) -> None:
        self.touched: set[str] = set()
        for k, g in enumerate(grads):
            self.ts[k] += 1
            given = {"p": self.ps[k], "g": g} | self.states[k]
            before = {n: x.copy() for n, x in given.items()}
            self.ps[k], self.states[k] = self.update(self.ps[k], g, self.states[k], t=self.ts[k], **self.hyper)
            self.touched |= {n for n, x in given.items() if not np.array_equal(x, before[n], equal_nan=True)}

    def params(self) -> list[Array]:
        return [np.array(p) for p in self.ps]

    def changed(self) -> list[str]:
        return sorted(self.touched)

    def state(self, k: int) -> dict[str, Array]:
        return {n: np.asarray(x) for n, x in self.states[k].items()}

    def force(self, k: int, p: Array, state: dict[str, Array], t: int) -> bool:
        if not state.keys() >= self.states[k].keys():
            return False
        self.ps[k], self.ts[k] = p.copy(), t
        self.states[k] = {n: state[n].copy() for n in self.states[k]}
        return True

    def save(self) -> Any:
        return [dict(s) for s in self.states], list(self.ts)

    def load(self, saved: Any) -> None:
        self.states, self.ts = [dict(s) for s in saved[0]], list(saved[1])

    def nbytes(self, k: int) -> int | None:
        return sum(x.nbytes for x in self.states[k].values() if x.size > 1 or self.ps[k].size == 1)


def moved(rule: Rule, hyper: dict[str, Any]) -> list[str]:
    """Hyper-parameters that are not at the reference's defaults."""
    return [n for n, x in hyper.items() if x != rule.defaults()[n]]


def accepted(f: Callable[..., Any]) -> set[str] | None:
    """Names of the arguments that a callable takes; None if it takes any."""
    kinds = inspect.signature(f).parameters
    if any(p.kind is p.VAR_KEYWORD for p in kinds.values()):
        return None
    return set(kinds) - {"self"}


def found(path: str) -> Any:
    """The object that "package.module:Name" names; a Target, a class or function that makes one, or a torch class.

    Raises ValueError with a sentence for a path that leads nowhere.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"a target is written as module:Name, got {path!r}")
    try:
        here: Any = importlib.import_module(module)
        for part in name.split("."):
            here = getattr(here, part)
    except ImportError as error:
        raise ValueError(f"{path}: cannot import {module}: {error}") from error
    except AttributeError as error:
        raise ValueError(f"{path}: {error}") from error
    return here


def load(path: str, **options: Any) -> Target:
    """The target that `path` names. `options` are passed on to a torch optimizer's constructor."""
    here = found(path)
    if isinstance(here, Target):
        return here
    if isinstance(here, type) and issubclass(here, Target):
        return here()
    if isinstance(here, Rule):
        return FunctionalTarget(here.init, here.update, path)
    if isinstance(here, type):
        from refopt.conform.torch_target import TorchTarget

        return TorchTarget(here, path, **options)
    made = here()
    if not isinstance(made, Target):
        raise ValueError(f"{path} is neither a torch optimizer nor a refopt.conform.Target, nor makes one")
    return made
