"""From a file to a file: what `refopt convert` does, without its command line."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from refopt_cuda import optim
from refopt_cuda.convert import files, shapes
from refopt_cuda.convert.bitsandbytes import from_bitsandbytes, to_bitsandbytes
from refopt_cuda.convert.factored import from_transformers, to_transformers
from refopt_cuda.convert.flashoptim import from_flashoptim, to_flashoptim
from refopt_cuda.convert.torch_optim import from_torch, to_torch
from refopt_cuda.convert.torchao import from_torchao, to_torchao
from refopt_cuda.optim import names

FROM: dict[str, Callable[..., dict[str, Any]]] = {
    "torch": from_torch,
    "bitsandbytes": from_bitsandbytes,
    "torchao": from_torchao,
    "flashoptim": from_flashoptim,
    "transformers": from_transformers,
}
TO: dict[str, Callable[..., dict[str, Any]]] = {
    "refopt": lambda opt: opt.state_dict(),
    "torch": to_torch,
    "bitsandbytes": to_bitsandbytes,
    "torchao": to_torchao,
    "flashoptim": to_flashoptim,
    "transformers": to_transformers,
}
CLASSES = (*names.__all__, *(name + suffix for name in ("Adafactor", "Muon") for suffix in ("", *names.KEPT)))
"""Of ours, those whose states other libraries have, too."""
KEYS = ("optimizer", "optimizer_state_dict", "optimizer_state")
"""Where training scripts put an optimizer's state among other things."""
OWN = ("codecs", "block", "min_size", "seed", "maximize")
"""Settings of our groups that decide how states are kept."""


def state_dict_in(path: Path, key: str | None = None) -> dict[str, Any]:
    """The optimizer's state dict in a file: the whole, or what lies under `key`, or under one of `KEYS`."""
    held = _read(path)
    found = held
    for name in [key] if key else ["", *KEYS]:
        found = held.get(name) if name and isinstance(held, Mapping) else held
        if isinstance(found, Mapping) and {"state", "param_groups"} <= found.keys():
            return dict(found)
    has = ", ".join(map(str, list(held)[:6])) if isinstance(held, Mapping) else type(held).__name__
    raise ValueError(f"{path} holds no state dict of an optimizer{f' under {key!r}' if key else ''}; it holds {has}")


def _read(path: Path) -> Any:
    """What a file holds; torchao's classes are made known where it is asked for."""
    try:
        return files.read(path)
    except pickle.UnpicklingError as error:
        if "torchao" not in str(error):
            raise ValueError(f"{path} cannot be read without running code from it") from error
    importlib.import_module("torchao.optim")
    return files.read(path)


def optimizer_for(
    state_dict: Mapping[str, Any],
    params: list[torch.Tensor],
    name: str | None,
    codecs: Any = None,
    of: str = "refopt",
    where: str = "the state dict",
) -> Any:
    """One of ours over these parameters in the state dict's groups: the class `name`, or as our own groups say.

    of, where  the library that the state dict is of, and what errors call it
    """
    if name is not None and name not in CLASSES:
        raise ValueError(f"optimizer must be one of {', '.join(CLASSES)}, got {name!r}")
    own = shapes.class_of(state_dict, where) if of == "refopt" else None
    if name and own and not issubclass(getattr(optim, name), getattr(optim, own)):
        raise ValueError(f"{where} is of {'a rule of elements' if own == 'Composed' else own}, not of {name}")
    groups, left = [], iter(params)
    for group in state_dict["param_groups"]:
        tensors = [torch.nn.Parameter(next(left), requires_grad=False) for _ in group["params"]]
        groups.append({"params": tensors} | {k: group[k] for k in OWN if name is None and k in group})
    if name is None:
        rule = (state_dict["param_groups"][0]["rule"],) if own == "Composed" else ()
        return getattr(optim, str(own))(groups, *rule)
    variant = {"variant": "torch"} if of == "torch" and name.startswith("Adafactor") else {}
    return getattr(optim, name)(groups, codecs=codecs, **variant)


def stem_of(opt: Any) -> str:
    """The rule of one of `CLASSES`."""
    return "muon" if isinstance(opt, optim.Muon) else str(opt.rule.stem)


def convert(
    source: Path,
    target: Path,
    *,
    of: str | None = None,
    to: str = "refopt",
    optimizer: str | None = None,
    codecs: Any = None,
    model: Path | None = None,
    key: str | None = None,
    dtype: torch.dtype = torch.float32,
    kind: str | None = None,
) -> Any:
    """Write `source`, a state dict of the library `of`, as one of the library `to`; returns our optimizer between them.

    optimizer  the class of ours that stands between ("AdamW8bit"); not needed for our own files
    codecs     its codecs, as for the class
    model      the weights' file, for shapes and dtypes; without it shapes are those of the states
    dtype      of the weights where neither file tells it
    kind       for torchao: of the class that will load the file, as `to_torchao` takes it

    Raises ValueError, TypeError or StateError with a sentence, and OSError for files; nothing is written then.
    """
    state_dict = state_dict_in(source, key)
    of = of or shapes.library_of(state_dict)
    for word, known in ((of, ("refopt", *FROM)), (to, TO)):
        if word not in known:
            raise ValueError(f"no library {word!r}; there are {', '.join(known)}")
    if optimizer is None and of != "refopt":
        raise ValueError(f"{source} is of {of}: name our class between (--optimizer AdamW8bit): it has rule and codecs")
    if model is not None:
        params = shapes.of_model(files.read(model), state_dict, str(model))
    else:
        params = shapes.parameters(state_dict, dtype, str(source))
    if to == "transformers" and model is None:
        for p in params:
            p.zero_()  # their RMS is kept, and found anew in the next step
    opt = optimizer_for(state_dict, params, optimizer, codecs, of, str(source))
    opt.load_state_dict(state_dict if of == "refopt" else FROM[of](state_dict, opt))
    if kind is not None and to != "torchao":
        raise ValueError(f"kind {kind!r} is a choice among torchao's classes, not of {to}")
    files.write(to_torchao(opt, kind) if kind else TO[to](opt), target)
    return opt
