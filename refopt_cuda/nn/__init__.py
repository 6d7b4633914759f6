"""Layers of torch that go with the optimizers here."""

from refopt_cuda.nn.embedding import Embedding, StableEmbedding

__all__ = ["Embedding", "StableEmbedding"]
