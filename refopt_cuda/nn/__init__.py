"""Layers for training in few bytes: linear layers frozen in 4 bits, adapters, embeddings whose states stay float32."""

from typing import Any

from refopt_cuda.nn.embedding import Embedding, StableEmbedding
from refopt_cuda.nn.linear4bit import Linear4bit
from refopt_cuda.nn.lora import LoRALinear
from refopt_cuda.nn.prepare import adapt, merge, prepare

__all__ = ["Embedding", "Linear4bit", "LoRALinear", "StableEmbedding", "adapt", "merge", "prepare"]

INSTEAD = dict.fromkeys(
    ("Linear8bitLt", "Int8Params", "OutlierAwareLinear"),
    "8-bit matrix products are not built; Linear4bit keeps frozen weights in 4 bits",
)
INSTEAD |= {"LinearNF4": "take Linear4bit, whose default it is", "LinearFP4": "take Linear4bit(quant_type='fp4')"}
INSTEAD |= {"Params4bit": "Linear4bit keeps its codes itself"}
INSTEAD |= dict.fromkeys(
    ("Embedding8bit", "Embedding4bit", "EmbeddingNF4", "EmbeddingFP4"),
    "frozen embeddings are not coded; Embedding is one whose states stay float32",
)
"""What bitsandbytes has and is not here, and what is."""


def __getattr__(name: str) -> Any:
    hint = f": {INSTEAD[name]}" if name in INSTEAD else ""
    raise AttributeError(f"refopt_cuda.nn has no {name}{hint}", name=name)
