"""`SM3`: Adagrad whose sums of squares are kept for rows and columns, not for weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, ClassVar

import torch
from torch import Tensor

from refopt.rules import RULES
from refopt.spec import Rule, State
from refopt_cuda.codecs import named
from refopt_cuda.optim import dialect, states
from refopt_cuda.optim.coded import put
from refopt_cuda.optim.matrix import MatrixOptimizer, Work
from refopt_cuda.optim.settings import Coding

FLOAT = Coding(named("f32"), 0)
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
    options   by keyword: codecs, of the momentum ("dynamic8", or {"m": ...}), block, min_8bit_size, overrides,
              maximize, max_grad_norm, gnorm_scale and capturable as for `Composed`; place ("paged", "host", "disk") and
              its words as for LAMB

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
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps, "variant": variant}, options)

    takes, places = dialect.LIVE, True
    codable: ClassVar[Mapping[str, State]] = {"m": State("m", "momentum", torch="momentum_buffer")}

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return RULES["sm3"]

    def _words(self, group: Mapping[str, Any]) -> Mapping[str, tuple[str, int | None]]:
        return WORDS

    def _layout(self, group: Mapping[str, Any], hyper: Mapping[str, Any], p: Tensor) -> states.Layout:
        shapes, inner = self._rule(group).shapes(tuple(p.shape), dict(hyper)), self._inner(group, p, tuple(p.shape))
        mu = (states.Part("mu", shapes["mu"], torch.float32, 0.0),)
        return (
            states.Layout((FLOAT, *inner.codings), (mu, *inner.parts))
            if "m" in shapes
            else states.Layout((FLOAT,), (mu,))
        )

    def _run(self, group: Mapping[str, Any], hyper: Mapping[str, Any], work: list[Work]) -> None:
        for w in work:
            mu, u = _update(w.state["mu"], w.gradient, hyper["eps"], hyper["variant"])
            put(w.state["mu"], mu, w.now.skip)
            if hyper["momentum"]:
                u = self._mean(w, u, group, hyper["momentum"])
            put(w.p, w.p.float().sub(u.mul(w.now.lr)), w.now.skip)

    def _mean(self, w: Work, u: Tensor, group: Mapping[str, Any], beta: float) -> Tensor:
        """The running mean of updates, kept."""
        shape = tuple(w.p.shape)
        coding, tensors = w.kept.codings[1], [w.state[part.key] for part in w.kept.parts[1]]
        room = self._room_for(group, [(coding, tensors, shape)] if w.p.is_cuda else ())
        m = room.decoded(coding, tensors, shape).mul(beta).add_(u.mul(1.0 - beta))
        room.store(coding, tensors, m, w.now.skip)
        return m


def _update(mu: Tensor, g: Tensor, eps: float, variant: str) -> tuple[Tensor, Tensor]:
    """The new accumulators, and g over the root of what covers it, 0 where nothing has come yet."""
    if variant == "II":
        nu = _least(mu, g.shape) + g * g
        mu = _greatest(nu)
    else:
        mu = mu + _greatest(g * g)
        nu = _least(mu, g.shape)
    none = nu == 0
    root = _root(torch.where(none, 1.0, nu + eps))
    return mu, torch.where(none, 0.0, g * root.reciprocal_())


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
