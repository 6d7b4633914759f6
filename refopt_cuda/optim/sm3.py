"""`SM3`: Adagrad whose sums of squares are kept for rows and columns, not for weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from refopt.rules import RULES
from refopt.spec import Rule
from refopt_cuda.optim import checks, states
from refopt_cuda.optim.matrix import MatrixOptimizer, Work

KEYS = {"mu": "mu", "m": "momentum_buffer"}
"""What `state[p]` calls the states of the rule."""
WORDS: Mapping[str, tuple[str, int | None]] = {
    "lr": ("lr", None),
    "momentum": ("momentum", None),
    "eps": ("eps", None),
    "variant": ("variant", None),
}


class SM3(MatrixOptimizer):
    """SM3-I and SM3-II (Anil et al., arXiv 1901.11150), over tensors of any number of axes.

    params    parameters or groups; float32, bfloat16 or float16, gradients likewise
    lr        step length, >= 0; tuned as Adagrad's
    momentum  decay of the running mean of updates, in [0, 1); 0: none is kept
    eps       added under the root, >= 0; TensorFlow has 1e-30, optax 1e-8
    variant   "II", the tighter of the paper's two, or "I"

    State: `step`, `mu`, a number for each index of each axis, axis after axis, and with momentum `momentum_buffer` of
    the parameter's shape; all float32. Passes of torch's own, each rounded by itself: the bits are the reference's.

    Raises TypeError or ValueError that name the argument, and StateError for a state that was altered; nothing is
    changed then.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 0.1,
        momentum: float = 0.9,
        eps: float = 0.0,
        *,
        variant: str = "II",
        **ways: Any,
    ) -> None:
        checks.ways(ways, type(self).__name__)
        defaults = {"lr": lr, "momentum": momentum, "eps": eps, "variant": variant}
        self._hyper(defaults, type(self).__name__)
        super().__init__(params, defaults)

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["sm3"]

    def _words(self, group: Mapping[str, Any]) -> Mapping[str, tuple[str, int | None]]:
        return WORDS

    def _layout(self, group: Mapping[str, Any], hyper: Mapping[str, Any], p: Tensor) -> states.Layout:
        shapes = self._rule(group).shapes(tuple(p.shape), dict(hyper))
        return states.Layout((), tuple((states.Part(KEYS[n], s, torch.float32, 0.0),) for n, s in shapes.items()))

    def _run(self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work]) -> None:
        for w in work:
            u = _update(w.state["mu"], w.g.float(), hyper["eps"], hyper["variant"])
            if hyper["momentum"]:
                m = w.state["momentum_buffer"]
                u = m.mul_(hyper["momentum"]).add_(u.mul_(1.0 - hyper["momentum"]))
            p = w.p.float()
            w.p.copy_(p.sub(u.mul(hyper["lr"])))


def _update(mu: Tensor, g: Tensor, eps: float, variant: str) -> Tensor:
    """g over the root of what covers it, 0 where nothing has come yet; the accumulators are overwritten."""
    if variant == "II":
        nu = _least(mu, g.shape) + g * g
        mu.copy_(_greatest(nu))
    else:
        mu.add_(_greatest(g * g))
        nu = _least(mu, g.shape)
    none = nu == 0
    root = _root(torch.where(none, 1.0, nu + eps))
    return torch.where(none, 0.0, g * root.reciprocal_())


def _root(x: Tensor) -> Tensor:
    """The nearest root. Of float32 torch's own is not that on the CPU (one in six is the next one, from 1,000 elements
    on); rounded twice from float64 it is."""
    return x.sqrt() if x.is_cuda else x.double().sqrt_().float()


def _greatest(x: Tensor) -> Tensor:
    """For each index of each axis the greatest x under it, axis after axis."""
    if x.ndim < 2:
        return x
    return torch.cat([x.amax([b for b in range(x.ndim) if b != a]) for a in range(x.ndim)])


def _least(mu: Tensor, shape: torch.Size) -> Tensor:
    """For each element the least accumulator of those that cover it."""
    if len(shape) < 2:
        return mu
    parts = mu.split(list(shape))
    return reduce(
        torch.minimum, (x.view([-1 if b == a else 1 for b in range(len(shape))]) for a, x in enumerate(parts))
    )
