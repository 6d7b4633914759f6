"""A list, tuple or dict of arrays, or one array: taken apart into its leaves, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refopt.spec import Array

Params = Any


def leaves(call: str, name: str, tree: Params, like: Params = None) -> list[Any]:
    """The arrays of a tree, in order; a dict of gradients in the order of the keys of its parameters (`like`)."""
    if isinstance(tree, np.ndarray | np.generic):
        tree = [tree]
    elif isinstance(tree, Mapping):
        keys = list(like if isinstance(like, Mapping) else tree)
        if set(keys) != set(tree):
            raise ValueError(f"{call}: {name} has keys {sorted(map(str, tree))}, params has {sorted(map(str, keys))}")
        tree = [tree[k] for k in keys]
    elif tree is None and name == "grads":
        tree = [None]
    elif not isinstance(tree, list | tuple):
        kind = type(tree).__name__
        raise TypeError(f"{call}: {name} must be an array, or a list, tuple or dict of arrays, got {kind}")
    for k, leaf in enumerate(tree):
        if not (isinstance(leaf, np.ndarray | np.generic) or (leaf is None and name == "grads")):
            raise TypeError(f"{call}: {name}[{k}] must be an array, got {type(leaf).__name__}")
    return [None if leaf is None else np.asarray(leaf) for leaf in tree]


def rebuild(like: Params, parts: list[Array]) -> Params:
    if isinstance(like, np.ndarray | np.generic):
        return parts[0]
    if isinstance(like, Mapping):
        return dict(zip(like, parts, strict=True))
    build: Callable[..., Any] = type(like)
    return build(parts)
