"""What the suite asks of an optimizer. An adapter is a subclass: three methods, and as many more as it can answer."""

from __future__ import annotations

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
        if odd := [x for x in self.states if not isinstance(x, dict)]:
            raise TypeError(f"init() gives {shown(odd[0])}, a dict of states was expected")

    def _for(self, f: Callable[..., Any], **further: Any) -> dict[str, Any]:
        """What a function takes of the hyper-parameters, and of `further`."""
        taken = accepted(f)
        return {n: x for n, x in (self.hyper | further).items() if taken is None or n in taken}

    def step(self, grads: Sequence[Array]) -> None:
        self.touched: set[str] = set()
        for k, g in enumerate(grads):
            self.ts[k] += 1
            given = {"p": self.ps[k], "g": g} | self.states[k]
            before = {n: x.copy() for n, x in given.items()}
            self.ps[k], self.states[k] = self._stepped(k, g)
            self.touched |= {n for n, x in given.items() if not np.array_equal(x, before[n], equal_nan=True)}

    def _stepped(self, k: int, g: Array) -> tuple[Array, dict[str, Array]]:
        further = self._for(self.update, t=self.ts[k])
        out = self.update(self.ps[k], g, self.states[k], **further)
        if not (isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict)):
            raise TypeError(f"update() gives {shown(out)}, (weights, dict of states) was expected")
        return out

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


def shown(x: Any) -> str:
    """A value in two words: its type, and what is in it."""
    return f"a tuple of {', '.join(type(y).__name__ for y in x)}" if isinstance(x, tuple) else f"a {type(x).__name__}"


def moved(rule: Rule, hyper: dict[str, Any]) -> list[str]:
    """Hyper-parameters that are not at the reference's defaults."""
    return [n for n, x in hyper.items() if x != rule.defaults()[n]]


def accepted(f: Callable[..., Any]) -> set[str] | None:
    """Names of the arguments that a callable takes; None if it takes any."""
    kinds = inspect.signature(f).parameters
    if any(p.kind is p.VAR_KEYWORD for p in kinds.values()):
        return None
    return set(kinds) - {"self"}
