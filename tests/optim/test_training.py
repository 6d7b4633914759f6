"""A training run on a GPU, taken again on the CPU: equal gradients give equal words at each of 1,000 steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import refopt_cuda as rc

STEPS = 1000
SETUPS: list[tuple[str, dict[str, Any]]] = [
    ("AdamW8bit", {"codecs": {"p": "bf16_rem16"}}),
    ("AdamW4bit", {}),
    ("Lion8bit", {"codecs": {"p": "bf16_sr"}}),
]


def learner(device: str) -> torch.nn.Module:
    torch.manual_seed(0)
    first, second, last = torch.nn.Linear(64, 200), torch.nn.Linear(200, 96), torch.nn.Linear(96, 16)
    return torch.nn.Sequential(first, torch.nn.GELU(), second, torch.nn.GELU(), last).to(device, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "words"), SETUPS, ids=lambda x: x if isinstance(x, str) else "")
def test_a_thousand_steps_on_a_gpu_have_the_bits_of_the_cpu(name: str, words: dict[str, Any]) -> None:
    model, mirror = learner("cuda"), learner("cpu")
    settings = {"lr": 3e-4, "weight_decay": 0.1, "min_8bit_size": 0, **words}
    ours = getattr(rc.optim, name)(model.parameters(), **settings)
    theirs = getattr(rc.optim, name)(mirror.parameters(), **settings)
    made = torch.Generator("cuda").manual_seed(1)
    teacher = torch.randn(64, 16, device="cuda", generator=made)
    losses = []
    for t in range(STEPS):
        x = torch.randn(128, 64, device="cuda", generator=made)
        loss = (model(x.bfloat16()).float() - torch.tanh(x @ teacher / 8)).square().mean()
        ours.zero_grad()
        loss.backward()
        for p, q in zip(model.parameters(), mirror.parameters(), strict=True):
            q.grad = p.grad.cpu()  # type: ignore[union-attr]
        ours.step()
        theirs.step()
        if t % 100 == 0 or t == STEPS - 1:
            losses.append(float(loss))
        for k, (p, q) in enumerate(zip(model.parameters(), mirror.parameters(), strict=True)):
            assert torch.equal(words_of(p), words_of(q)), f"step {t + 1}, tensor {k}: p"
            for key, x in ours.state[p].items():
                y = theirs.state[q][key]
                same = x == y if key == "step" else torch.equal(words_of(x), words_of(y))
                assert same, f"step {t + 1}, tensor {k}: {key}"
    assert losses[-1] < 0.7 * losses[0], losses


def words_of(x: torch.Tensor) -> torch.Tensor:
    """A tensor's words on the CPU."""
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.detach().contiguous().view(kind).cpu()
