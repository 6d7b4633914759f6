"""Layers for training in few bytes: linear layers frozen in 4 bits, adapters, embeddings whose states stay float32."""

from refopt_cuda.nn.embedding import Embedding, StableEmbedding
from refopt_cuda.nn.linear4bit import Linear4bit
from refopt_cuda.nn.lora import LoRALinear
from refopt_cuda.nn.prepare import adapt, merge, prepare

__all__ = ["Embedding", "Linear4bit", "LoRALinear", "StableEmbedding", "adapt", "merge", "prepare"]
