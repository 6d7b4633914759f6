"""Layers for fine-tuning in few bytes: linear layers frozen in 4 bits, adapters, and the swap of a whole model."""

from refopt_cuda.nn.linear4bit import Linear4bit
from refopt_cuda.nn.lora import LoRALinear
from refopt_cuda.nn.prepare import adapt, merge, prepare

__all__ = ["Linear4bit", "LoRALinear", "adapt", "merge", "prepare"]
