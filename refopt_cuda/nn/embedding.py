"""Embeddings whose optimizer states stay in float32: rows that are seldom used do not bear coarse states well."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MARK = "_refopt_overrides"
"""The attribute that `refopt_cuda.optim` reads settings of single parameters from."""


class Embedding(nn.Embedding):
    """`torch.nn.Embedding` with Xavier uniform weights, whose states every optimizer here keeps in float32.

    Arguments, input and output are torch's; bitsandbytes has the same class. The setting follows the weight through
    `to`, copies, pickles and FSDP. A head that is tied to the weight shares it.
    """

    def reset_parameters(self) -> None:
        """Xavier uniform; the row of `padding_idx` is zero."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":
            self._mark()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark()

    def _apply(self, *args: Any, **words: Any) -> Embedding:
        super()._apply(*args, **words)
        self._mark()
        return self

    def _mark(self) -> None:
        weight = self._parameters.get("weight")
        if weight is not None:
            setattr(weight, MARK, {**getattr(weight, MARK, {}), "optim_bits": 32})


class StableEmbedding(Embedding):
    """`Embedding` with a layer norm behind it (Dettmers et al., arXiv 2110.02861, section 2.3), as bitsandbytes has it.

    The norm is taken in torch's default dtype; the output has the weight's. Raises what torch.nn.Embedding raises.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse, _weight)
        super().__init__(num_embeddings, embedding_dim, *options, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(embedding_dim, device=device)

    def forward(self, input: Tensor) -> Tensor:
        """input int [...]; output [..., embedding_dim] in the weight's dtype."""
        x = super().forward(input).to(torch.get_default_dtype())
        weight, bias = self.norm.weight.to(x.dtype), self.norm.bias.to(x.dtype)
        return F.layer_norm(x, self.norm.normalized_shape, weight, bias, self.norm.eps).to(self.weight.dtype)
