"""Optimizers for torch: the names and arguments of torch.optim and bitsandbytes, over the kernels of this package."""

from refopt_cuda.optim import names
from refopt_cuda.optim.composed import Composed
from refopt_cuda.optim.names import *  # noqa: F403

__all__ = ["Composed", *names.__all__]
