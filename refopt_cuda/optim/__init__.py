"""Optimizers for torch: the names and arguments of torch.optim and bitsandbytes, over the kernels of this package."""

from typing import Any

from refopt_cuda.optim import names, placed, whole_names
from refopt_cuda.optim.apollo import APOLLOAdamW, APOLLOAdamW8bit
from refopt_cuda.optim.backward import InBackward, in_backward
from refopt_cuda.optim.composed import Composed
from refopt_cuda.optim.galore import GaLoreAdamW, GaLoreAdamW8bit
from refopt_cuda.optim.muon import Muon, Muon8bit
from refopt_cuda.optim.names import *  # noqa: F403
from refopt_cuda.optim.overrides import GlobalOptimManager, groups
from refopt_cuda.optim.placed import *  # noqa: F403
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
    *whole_names.__all__,
    *names.__all__,
    *placed.__all__,
]

INSTEAD = {
    "PytorchLARS": "LARS(variant='clip'), which measures steps without their decay",
}
"""What bitsandbytes has and is not here: what to take."""


def __getattr__(name: str) -> Any:
    hint = f": take {INSTEAD[name]}" if name in INSTEAD else ""
    if name.removeprefix("Paged") in __all__:
        hint = f": take {name.removeprefix('Paged')}; it has no fast path in another place than the device's memory"
    raise AttributeError(f"refopt_cuda.optim has no {name}{hint}", name=name)
