"""Settings for single parameters: bitsandbytes' `GlobalOptimManager`, and groups by patterns of names.

A parameter carries what was said about it. An optimizer reads that when it makes the parameter's group (learning rates
and other hyper-parameters, which need a group of their own) and in the group's first step (how states are kept).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch

from refopt_cuda.optim import dialect
from refopt_cuda.optim import settings as records

MARK = "_refopt_overrides"
"""The attribute of a parameter that holds {setting: value}; `refopt_cuda.nn` writes it too."""
KEPT = ("codecs", "block", "min_size")
"""Settings that say how states are kept."""
WORDS = {"min_8bit_size": "min_size"}
_applied: weakref.WeakKeyDictionary[torch.optim.Optimizer, dict[int, dict[str, Any]]] = weakref.WeakKeyDictionary()
"""By optimizer and identity of a parameter: hyper-parameters that were overridden when its group was made."""


def translated(config: Mapping[str, Any], call: str) -> dict[str, Any]:
    """bitsandbytes' words as ours: `optim_bits` is a codec, `min_8bit_size` is min_size. ValueError for what no
    parameter can have alone."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if name == "optim_bits":
            out["codecs"] = dialect.usual(call, None, value)
        elif name in ("params", "param_names", "rule", "place", "is_paged", "max_unorm"):
            raise ValueError(f"{call}: {name} cannot be set for one parameter, got {value!r}")
        else:
            out[WORDS.get(name, name)] = value
    return dialect.settings(call, out)


class GlobalOptimManager:
    """Settings for single parameters, with bitsandbytes' interface; there is one for the process.

    >>> manager = GlobalOptimManager.get_instance()
    >>> weight = torch.nn.Parameter(torch.zeros(64, 64))
    >>> manager.override_config(weight, "optim_bits", 32)
    >>> settings_of(weight)
    {'codecs': 'f32'}

    Settings are those of a parameter group (`lr`, `betas`, `weight_decay`, `codecs`, `block`, `min_size` ...) and
    bitsandbytes' `optim_bits` and `min_8bit_size`. How states are kept may be set until the optimizer's first step;
    hyper-parameters before the optimizer is made.
    """

    _instance: GlobalOptimManager | None = None

    def __init__(self) -> None:
        raise RuntimeError("GlobalOptimManager: call get_instance()")

    @classmethod
    def get_instance(cls) -> GlobalOptimManager:
        """The one manager."""
        if cls._instance is None:
            cls._instance = object.__new__(cls)
            cls._instance.modules = []
        return cls._instance

    modules: list[tuple[weakref.ref[torch.nn.Module], str, dict[str, Any]]]

    def register_parameters(self, params: Any) -> None:
        """Needs not be called; bitsandbytes' programs do."""

    def override_config(
        self,
        parameters: torch.Tensor | Iterable[torch.Tensor],
        key: str | None = None,
        value: Any = None,
        key_value_dict: Mapping[str, Any] | None = None,
    ) -> None:
        """One setting, or several, of these parameters. ValueError for a setting that no single parameter has."""
        call = "GlobalOptimManager.override_config"
        if (key is None) == (key_value_dict is None):
            raise ValueError(f"{call}: give a key and its value, or key_value_dict; got {key!r} and {key_value_dict!r}")
        config = translated({key: value} if key_value_dict is None else key_value_dict, call)  # type: ignore[dict-item]
        for p in [parameters] if isinstance(parameters, torch.Tensor) else parameters:
            mark(p, config)
            for opt in _applied:
                if any(p is q and "overrides" in group for group in opt.param_groups for q in group["params"]):
                    name = type(opt).__name__
                    warnings.warn(f"{call}: {name} has stepped this parameter and keeps its settings", stacklevel=2)

    def register_module_override(self, module: torch.nn.Module, param_name: str, config: Mapping[str, Any]) -> None:
        """The settings of a module's parameter, also if the module gets another tensor for it later."""
        call = "GlobalOptimManager.register_module_override"
        if not isinstance(getattr(module, param_name, None), torch.Tensor):
            raise ValueError(f"{call}: {type(module).__name__} has no parameter {param_name!r}")
        self.modules.append((weakref.ref(module), param_name, translated(config, call)))

    def mark(self) -> None:
        """Write what was said about modules on the parameters that they have now."""
        self.modules = [entry for entry in self.modules if entry[0]() is not None]
        for module, name, config in self.modules:
            p = getattr(module(), name, None)
            if isinstance(p, torch.Tensor):
                mark(p, config)


def mark(p: torch.Tensor, config: Mapping[str, Any]) -> None:
    """Add to the settings that a parameter carries."""
    setattr(p, MARK, {**settings_of(p), **config})


def settings_of(p: torch.Tensor) -> dict[str, Any]:
    """What was said about a parameter, in our words."""
    return translated(getattr(p, MARK, {}), MARK)


def groups(
    params: torch.nn.Module | Iterable[Any], patterns: Mapping[str, Mapping[str, Any]], *, call: str = "groups"
) -> list[dict[str, Any]]:
    """Parameter groups by names: for any optimizer's first argument, torch's too.

    params    a module, or pairs (name, parameter) as `named_parameters()` gives; those without gradient are left out
    patterns  {pattern as in a shell: settings of a group}, "*norm*": {"weight_decay": 0.0}; of all that match a name,
              later ones win. `optim_bits` and `min_8bit_size` may stand for codecs and min_size

    Parameters of equal settings share a group; groups stand in the order of their first parameters. ValueError for
    parameters without names and for a pattern that matches none.

    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.LayerNorm(64))
    >>> [(g.get("codecs"), len(g["params"])) for g in groups(model, {"0.*": {"codecs": "f32"}})]
    [('f32', 1), (None, 2)]
    """
    named = list(params.named_parameters() if isinstance(params, torch.nn.Module) else params)
    if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in named):
        raise ValueError(f"{call}: patterns of names need pairs (name, parameter); give model.named_parameters()")
    known = {pattern: translated(config, call) for pattern, config in patterns.items()}
    for pattern in known:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(f"{call}: no parameter's name matches {pattern!r}; there are {_some(n for n, _ in named)}")
    out: list[dict[str, Any]] = []
    for name, p in named:
        own: dict[str, Any] = {}
        for pattern, config in known.items():
            own |= config if fnmatchcase(name, pattern) else {}
        same = next((g for g in out if {k: v for k, v in g.items() if k != "params"} == own), None)
        if same is None:
            out.append(same := {"params": [], **own})
        if p.requires_grad:
            same["params"].append(p)
    return [group for group in out if group["params"]]


def of_class(params: Any, patterns: Mapping[str, Any], known: Iterable[str], call: str) -> list[dict[str, Any]]:
    """The same for a class whose groups hold these settings; ValueError for any other."""
    out = groups(params, patterns, call=call)
    for name in (name for group in out for name in group if name not in {*known, "params", "param_names"}):
        raise ValueError(f"{call}: overrides has {name!r}, which no group holds; there are {', '.join(sorted(known))}")
    return out


def _some(names: Iterable[str], most: int = 5) -> str:
    known = list(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def apart(opt: torch.optim.Optimizer, group: dict[str, Any], call: str, coded: bool = True) -> list[dict[str, Any]]:
    """A group that torch has made, cut where parameters have hyper-parameters of their own. ValueError for a name that
    the optimizer does not have, and for a codec where its states are not `coded`."""
    _look_at_modules()
    names = ("params", "param_names")
    out: list[dict[str, Any]] = []
    shared = {k: v for k, v in group.items() if k not in names}
    lists = {name: group[name] for name in names if name in group}
    applied = _applied.setdefault(opt, {})
    for k, p in enumerate(group["params"]):
        said = settings_of(p)
        own = {name: value for name, value in said.items() if name not in KEPT}
        if not coded and said.get("codecs", "f32") != "f32":
            raise ValueError(
                f"{call}: codecs is overridden for a parameter, got {said['codecs']!r}; states are float32"
            )
        for name in own:
            if name not in opt.defaults:
                raise ValueError(f"{call}: {name} is overridden for a parameter; there are {', '.join(opt.defaults)}")
        applied[id(p)] = own
        same = next((g for g in out if g["own"] == own), None)
        if same is None:
            out.append(same := {"own": own, **{name: [] for name in lists}})
        for name, values in lists.items():
            same[name].append(values[k])
    return [shared | g.pop("own") | g for g in out] or [group]


def refuse_late(opt: torch.optim.Optimizer, p: torch.Tensor, call: str) -> None:
    """RuntimeError for a hyper-parameter that was overridden after the optimizer was made; in the first step of `p`."""
    applied = _applied.get(opt)
    own = {name: value for name, value in settings_of(p).items() if name not in KEPT}
    if applied is not None and own != applied.get(id(p), {}):
        raise RuntimeError(
            f"{call}: {', '.join(own)} of a parameter was overridden after {type(opt).__name__} was made; "
            "override before, or give the parameter a group of its own"
        )


def settle(opt: Any, call: str) -> None:
    """In a group's first step: `group["overrides"]` becomes what `kept` says."""
    if any("overrides" not in group for group in opt.param_groups):
        for group, own in zip(opt.param_groups, kept(opt, call), strict=True):
            group["overrides"] = own


def kept(opt: Any, call: str) -> list[dict[int, dict[str, Any]]]:
    """Of each group: {place in the group: how this parameter's states are kept}, where that is not as in the group.

    RuntimeError for a hyper-parameter that was overridden after the optimizer was made.
    """
    _look_at_modules()
    return [group["overrides"] if "overrides" in group else _kept(opt, group, call) for group in opt.param_groups]


def _kept(opt: Any, group: dict[str, Any], call: str) -> dict[int, dict[str, Any]]:
    out: dict[int, dict[str, Any]] = {}
    for k, p in enumerate(group["params"]):
        refuse_late(opt, p, call)
        own = {name: value for name, value in settings_of(p).items() if name in KEPT}
        if own:
            own["codecs"] = records.codec_names(opt.rule, own.get("codecs"), group["codecs"], call)
            records.check_group(opt.rule, {**group, **own}, call)
            out[k] = own
    return out


def _look_at_modules() -> None:
    if GlobalOptimManager._instance is not None:
        GlobalOptimManager._instance.mark()
