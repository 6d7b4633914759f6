"""Optimizers for torch: the names and arguments of torch.optim and bitsandbytes, over the kernels of this package."""

from refopt_cuda.optim.composed import Composed
from refopt_cuda.optim.names import SGD, Adam, Adam8bit, AdamW, AdamW8bit, Lion, Lion8bit, SGD8bit

__all__ = ["SGD", "Adam", "Adam8bit", "AdamW", "AdamW8bit", "Composed", "Lion", "Lion8bit", "SGD8bit"]
