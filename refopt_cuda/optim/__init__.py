"""Optimizers for torch: the names and arguments of torch.optim and bitsandbytes, over the kernels of this package."""

import difflib
from typing import Any

import torch

from refopt_cuda.optim import matrix_names, names, placed, schedule_free, whole_names
from refopt_cuda.optim.apollo import APOLLOAdamW, APOLLOAdamW8bit
from refopt_cuda.optim.backward import InBackward, in_backward
from refopt_cuda.optim.composed import Composed
from refopt_cuda.optim.galore import GaLoreAdamW, GaLoreAdamW8bit
from refopt_cuda.optim.matrix_names import *  # noqa: F403
from refopt_cuda.optim.muon import Muon, Muon8bit
from refopt_cuda.optim.names import *  # noqa: F403
from refopt_cuda.optim.overrides import GlobalOptimManager, groups
from refopt_cuda.optim.placed import *  # noqa: F403
from refopt_cuda.optim.schedule_free import *  # noqa: F403
from refopt_cuda.optim.sm3 import SM3
from refopt_cuda.optim.whole_names import *  # noqa: F403

__all__ = [
    "APOLLOAdamW",
    "APOLLOAdamW8bit",
    "Composed",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GlobalOptimManager",
    "InBackward",
    "Muon",
    "Muon8bit",
    "SM3",
    "groups",
    "in_backward",
    *matrix_names.__all__,
    *schedule_free.__all__,
    *whole_names.__all__,
    *names.__all__,
    *placed.__all__,
]

INSTEAD = {
    "PytorchLARS": "LARS(variant='clip'), which measures steps without their decay",
}
"""What bitsandbytes has and is not here: what to take."""
TORCHS = ("Optimizer", "lr_scheduler", "swa_utils")
"""What programs find in torch.optim beside optimizers; it works with those here, and is handed over as it is."""


def __getattr__(name: str) -> Any:
    if name in TORCHS:
        return getattr(torch.optim, name)
    raise AttributeError(f"refopt_cuda.optim has no {name}{_hint(name)}", name=name)


def _hint(name: str) -> str:
    """What to take instead."""
    if name in INSTEAD:
        return f": take {INSTEAD[name]}"
    if name.removeprefix("Paged") in __all__:
        return f": take {name.removeprefix('Paged')}; it has no fast path in another place than the device's memory"
    for suffix, (codec, _) in names.KEPT.items():
        if name.removesuffix(suffix) in __all__:
            return f": take {name.removesuffix(suffix)}(codecs={codec!r})"
    if hasattr(torch.optim, name):
        return ": it is in torch.optim, and its rule is not here"
    near = difflib.get_close_matches(name, __all__, 3)
    return f": is it {', '.join(near)}?" if near else ""
