"""The adapter for optimizers in the style of optax: `tx = make(**words)`, `tx.init(p)`, `tx.update(g, state, p)`.

States are trees of named tuples, dicts and lists; theirs are found by the names that optax gives them, and the count of
steps is set with them. Nothing of optax is imported: whatever has `init` and `update` is stepped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from refopt.conform.target import Target, accepted, moved
from refopt.spec import Array, Rule

f32 = np.float32

WORDS: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate", "lr"),
    "beta1": ("b1", "beta1"),
    "beta2": ("b2", "beta2"),
    "beta3": ("b3", "beta3"),
    "alpha": ("alpha", "decay"),
    "wd": ("weight_decay", "weight_decay_rate", "wd"),
    "clip": ("clipping_threshold", "clip"),
    "init_acc": ("initial_accumulator_value", "init_acc"),
    "momentum": ("momentum", "beta"),
    "trust": ("trust_coefficient", "trust"),
}
"""optax's words for a hyper-parameter; for others, its own name."""

STATES: dict[str, tuple[str, ...]] = {
    "m": ("mu", "m"),
    "v": ("nu", "trace", "v"),
    "w": ("nu_max", "w"),
    "buf": ("trace", "buf"),
    "a": ("mu", "a"),
    "s": ("sum_of_squares", "s"),
    "B": ("mu", "B"),
}
"""optax's names for a state; for others, its own."""

FIRST = {("sm3", "m"): "nu"}
"""Where optax has a name of the table for something else."""

COUNTS = ("count", "count_m2", "step_count")


def named(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name of the field it stands under, array) for every array of a tree."""
    if hasattr(tree, "_fields"):
        for field in tree._fields:
            yield from named(getattr(tree, field), field)
    elif isinstance(tree, dict):
        for key, x in tree.items():
            yield from named(x, str(key))
    elif isinstance(tree, list | tuple):
        for x in tree:
            yield from named(x, name)
    elif hasattr(tree, "shape"):
        yield name, tree


def replaced(tree: Any, put: Callable[[str, Any], Any], name: str = "") -> Any:
    """The same tree with put(name, array) in every array's place."""
    if hasattr(tree, "_fields"):
        return tree._replace(**{f: replaced(getattr(tree, f), put, f) for f in tree._fields})
    if isinstance(tree, dict):
        return {key: replaced(x, put, str(key)) for key, x in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(replaced(x, put, name) for x in tree)
    return put(name, tree) if hasattr(tree, "shape") else tree


def alike(x: Any, values: Array) -> Any:
    """An array of the kind that x is, with these values."""
    return x.at[...].set(values) if hasattr(x, "at") else values.astype(x.dtype)


def kept(name: str, x: Any) -> Any:
    """An array that no later step can write into; those of JAX are such."""
    return x.copy() if isinstance(x, np.ndarray) else x


class OptaxTarget(Target):
    """A function that makes gradient transformations: `make(learning_rate=..., b1=...)`. `options` go to it as well.

    The result must have `init(p) -> state` and `update(g, state, p) -> (u, state)`, as in optax; p + u are the weights
    after a step. What `make` has no word for is not passed on; weight decay, which optax may leave to another
    transformation, is then asked about nowhere.
    """

    def __init__(self, make: Callable[..., Any], name: str = "", **options: Any) -> None:
        self.make, self.name, self.options = make, name or getattr(make, "__qualname__", "optax"), options

    def refuses(self, rule: Rule, hyper: dict[str, Any]) -> list[str]:
        return [n for n in moved(rule, hyper) if self._word(n) is None]

    def _word(self, name: str) -> str | None:
        taken = accepted(self.make)
        return next((w for w in (*WORDS.get(name, ()), name) if taken is None or w in taken), None)

    def start(self, rule: Rule, params: Sequence[Array], hyper: dict[str, Any], dtype: str = "float32") -> None:
        begun = {n: x for n, x in rule.defaults().items() if n == "init_acc"}  # optax begins Adagrad elsewhere
        words = {w: x for n, x in (begun | hyper).items() if (w := self._word(n)) is not None}
        if both := words.keys() & self.options.keys():
            raise ValueError(f"{self.name}: {', '.join(sorted(both))} cannot be an option: the suite sets it itself")
        self.rule, self.tx = rule, self.make(**words, **self.options)
        if not (hasattr(self.tx, "init") and hasattr(self.tx, "update")):
            raise TypeError(f"{self.name} made a {type(self.tx).__name__}, which has no init and update")
        self.ps = [p.copy() for p in params]
        self.states = [self.tx.init(p.copy()) for p in params]

    def step(self, grads: Sequence[Array]) -> None:
        self.touched = False
        for k, g in enumerate(grads):
            given = g.copy()
            u, self.states[k] = self.tx.update(given, self.states[k], self.ps[k].copy())
            self.touched |= not np.array_equal(given, g, equal_nan=True)
            self.ps[k] = np.asarray(self.ps[k] + np.asarray(u))

    def params(self) -> list[Array]:
        return [p.copy() for p in self.ps]

    def changed(self) -> list[str]:
        return ["g"] if self.touched else []

    def _names(self, k: int) -> dict[str, str]:
        """The field of each of the record's states that parameter k has; a field is taken once."""
        fields = {name for name, x in named(self.states[k]) if x.size == self.ps[k].size and name not in COUNTS}
        out: dict[str, str] = {}
        for st in self.rule.states:
            for word in (FIRST.get((self.rule.stem, st.name), ""), *STATES.get(st.name, ()), st.name):
                if word in fields - set(out.values()):
                    out[st.name] = word
                    break
        return out

    def state(self, k: int) -> dict[str, Array]:
        size, names = self.ps[k].size, self._names(k)
        held = {name: np.array(x) for name, x in named(self.states[k]) if x.size == size}
        return {n: held[word] for n, word in names.items()}

    def force(self, k: int, p: Array, state: dict[str, Array], t: int) -> bool:
        names, size = {word: n for n, word in self._names(k).items()}, self.ps[k].size
        known = all(name in names for name, x in named(self.states[k]) if x.size > 1)
        if not known or not state.keys() >= set(names.values()):
            return False

        def put(name: str, x: Any) -> Any:
            if name in COUNTS:
                return alike(x, np.full(x.shape, t, x.dtype))
            return alike(x, state[names[name]].reshape(x.shape)) if name in names and x.size == size else x

        self.ps[k], self.states[k] = p.copy(), replaced(self.states[k], put)
        return True

    def save(self) -> Any:
        return [replaced(s, kept) for s in self.states]

    def load(self, saved: Any) -> None:
        self.states = [replaced(s, kept) for s in saved]

    def nbytes(self, k: int) -> int | None:
        return sum(int(x.nbytes) for _, x in named(self.states[k]) if x.size > 1 or self.ps[k].size == 1)
