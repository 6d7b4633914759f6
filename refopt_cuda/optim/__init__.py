"""Optimizers for torch: the names and arguments of torch.optim and bitsandbytes, over the kernels of this package."""

from refopt_cuda.optim import names, placed, whole
from refopt_cuda.optim.apollo import APOLLOAdamW
from refopt_cuda.optim.backward import InBackward, in_backward
from refopt_cuda.optim.composed import Composed
from refopt_cuda.optim.galore import GaLoreAdamW, GaLoreAdamW8bit
from refopt_cuda.optim.muon import Muon
from refopt_cuda.optim.names import *  # noqa: F403
from refopt_cuda.optim.placed import *  # noqa: F403
from refopt_cuda.optim.whole import *  # noqa: F403

__all__ = [
    "APOLLOAdamW",
    "Composed",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "InBackward",
    "Muon",
    "in_backward",
    *whole.__all__,
    *names.__all__,
    *placed.__all__,
]
