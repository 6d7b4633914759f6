"""The rules against torch.optim, an independent implementation, over 50 steps."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.strategies import f32, follow

torch = pytest.importorskip("torch")
BETAS = {"betas": (0.8, 0.97), "eps": 1e-7}
PEERS = [
    ("sgd", "SGD", {"lr": 0.003, "weight_decay": 0.07}),
    ("sgd", "SGD", {"lr": 0.003, "momentum": 0.85, "dampening": 0.2, "weight_decay": 0.07}),
    ("sgd", "SGD", {"lr": 0.003, "momentum": 0.85, "nesterov": True, "weight_decay": 0.07}),
    ("sgd", "SGD", {"lr": 0.003, "momentum": 0.85, "maximize": True}),
    ("adam", "Adam", {"lr": 0.003, "weight_decay": 0.06} | BETAS),
    ("adamw", "AdamW", {"lr": 0.003, "weight_decay": 0.11} | BETAS),
    ("adamw", "AdamW", {"lr": 0.003, "weight_decay": 0.11, "maximize": True} | BETAS),
    ("rmsprop", "RMSprop", {}),
    ("rmsprop", "RMSprop", {"lr": 0.003, "alpha": 0.9, "weight_decay": 0.06, "eps": 1e-7, "maximize": True}),
    ("rmsprop", "RMSprop", {"lr": 0.003, "alpha": 0.9, "weight_decay": 0.06, "momentum": 0.85}),
    ("rmsprop", "RMSprop", {"lr": 0.0003, "alpha": 0.9, "centered": True, "momentum": 0.5, "eps": 1e-3}),
    ("adagrad", "Adagrad", {}),
    ("adagrad", "Adagrad", {"lr": 0.003, "lr_decay": 0.1, "weight_decay": 0.06, "eps": 1e-7, "maximize": True}),
    ("adagrad", "Adagrad", {"lr": 0.003, "init_acc": 0.2}),
    ("adam", "Adam", {"lr": 0.003, "weight_decay": 0.06, "amsgrad": True} | BETAS),
    ("adam", "Adam", {"lr": 0.003, "weight_decay": 0.06, "decoupled_weight_decay": True} | BETAS),
    ("adamw", "AdamW", {"lr": 0.003, "weight_decay": 0.11, "amsgrad": True} | BETAS),
    ("adam", "Adam", {}),
    ("adamw", "AdamW", {}),
]


def theirs(name: str, p: Any, grads: Any, hyper: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    weight = torch.nn.Parameter(torch.from_numpy(p.copy()))
    opt = getattr(torch.optim, name)([weight], **hyper)
    for g in grads:
        weight.grad = torch.from_numpy(g)
        opt.step()
    return weight.detach().numpy(), opt.state[weight]


@pytest.mark.parametrize(("stem", "name", "hyper"), PEERS, ids=lambda x: str(x) if isinstance(x, str) else None)
def test_fifty_steps_agree_with_torch(ref: ModuleType, stem: str, name: str, hyper: dict[str, Any]) -> None:
    """p to 2e-6. torch updates m as m + (1 - beta1)(g - m), which cancels: m is held to 2e-6 of its largest element."""
    rng = np.random.default_rng(11)
    p = (rng.choice([-1, 1], 2000) * rng.uniform(1, 3, 2000)).astype(f32)
    grads = [(rng.standard_normal(2000) * 10 ** rng.uniform(-4, 0)).astype(f32) for _ in range(50)]
    words = {s.name: s.torch for s in ref.rules.RULES[stem].hypers if s.torch and "[" not in s.torch}
    want, torchs = theirs(name, p, grads, {words.get(k, k): x for k, x in hyper.items()})
    if hyper.get("decoupled_weight_decay"):
        hyper = {k: x for k, x in hyper.items() if k != "decoupled_weight_decay"} | {"decay": "decoupled"}
    got, state = follow(ref.Optimizer(stem, **hyper), [p], [[g] for g in grads])
    np.testing.assert_allclose(got[0], want, rtol=2e-6)
    for s in ref.rules.RULES[stem].states:
        if s.name in state[0]:
            x = torchs[s.torch].numpy()
            np.testing.assert_allclose(state[0][s.name], x, rtol=2e-6, atol=2e-6 * np.abs(x).max())
