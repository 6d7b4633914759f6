"""What "module:Name" names, as a target: one of the suite's own, a class of torch's style, a function of optax's."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

from refopt.conform.optax_target import OptaxTarget
from refopt.conform.target import FunctionalTarget, Target
from refopt.spec import Rule


def found(path: str) -> Any:
    """The object that "package.module:Name" names; the working directory is searched too.

    Raises ValueError with a sentence for a path that leads nowhere.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"a target is written as module:Name, got {path!r}")
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.append(str(Path.cwd()))
    try:
        here: Any = importlib.import_module(module)
    except Exception as error:
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        raise ValueError(f"{path}: cannot import {module}: {kind}{error}") from error
    try:
        for part in name.split("."):
            here = getattr(here, part)
    except AttributeError as error:
        raise ValueError(f"{path}: {error}") from error
    return here


def load(path: str, **options: Any) -> Target:
    """The target that `path` names. `options` go to a torch optimizer's constructor, or to a function like optax's.

    Raises ValueError with a sentence for what is no target and makes none, and for options that nothing takes.
    """
    here = found(path)
    if isinstance(here, type) and not issubclass(here, Target):
        return of_torch(here, path, options)
    if not isinstance(here, type | Target | Rule) and callable(here) and makes_transformations(here, path):
        return OptaxTarget(here, path, **without_place(path, options))
    if options:
        raise ValueError(f"{path} takes no options, got {', '.join(options)}: they are for a constructor of its own")
    if isinstance(here, Target):
        return here
    if isinstance(here, Rule):
        return FunctionalTarget(here.init, here.update, path)
    return called(here, path)


def makes_transformations(make: Any, path: str) -> bool:
    """Whether a function is of optax's kind: it needs hyper-parameters, or takes some and makes a transformation."""
    taken = inspect.signature(make).parameters.values()
    named = [p for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if any(p.default is p.empty for p in named):
        return True
    return bool(named) and transforms(result(make, path))


def of_torch(cls: type, path: str, options: dict[str, Any]) -> Target:
    """A class with a `step`, stepped as torch's are."""
    if not callable(getattr(cls, "step", None)):
        raise ValueError(f"{path} is a class without step: neither a torch optimizer nor a refopt.conform.Target")
    from refopt.conform.torch_target import TorchTarget

    return TorchTarget(cls, path, **options)


def without_place(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Options for a function; device and compiled are torch's."""
    device, compiled = options.get("device", "cpu"), options.get("compiled", False)
    if device != "cpu" or compiled:
        raise ValueError(f"{path} is no torch optimizer: it takes neither --device nor --compiled")
    return {n: x for n, x in options.items() if n not in ("device", "compiled")}


def called(make: Any, path: str) -> Target:
    """The target that a function or class without arguments makes."""
    if not callable(make):
        kept = " of which hyper-parameters cannot be set: name the function that makes it" if transforms(make) else ""
        raise ValueError(f"{path} is a {type(make).__name__},{kept or ' not an optimizer, nor makes one'}")
    made = result(make, path)
    if not isinstance(made, Target):
        raise ValueError(f"{path} is neither a torch optimizer nor a refopt.conform.Target, nor makes one")
    return made


def result(make: Any, path: str) -> Any:
    """What a call without arguments gives."""
    try:
        return make()
    except Exception as error:
        raise ValueError(f"{path} raises {type(error).__name__} when it is called: {error}") from error


def transforms(x: Any) -> bool:
    return hasattr(x, "init") and hasattr(x, "update")
