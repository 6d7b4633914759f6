"""States as FlashOptim stores them, by a stand-in: its library needs a GPU to be made, its formats do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refopt import conform
from refopt.conform import torch_codes
from refopt.conform.codes import judge
from refopt.conform.record import Run, Taken
from refopt.conform.target import decoded

torch = pytest.importorskip("torch")
f32 = np.float32


class Stored:
    """A state in 8 bits with a float16 scale for 32 elements: signed through 2x / (1 + |x|), squares by their root."""

    def __init__(self, x: Any, signed: bool) -> None:
        self._signed, self._softsign, self._sqrt, self.shape = signed, signed, not signed, x.shape
        flat = torch.nn.functional.pad(x.reshape(-1), (0, -x.numel() % 32)).reshape(-1, 32)
        flat = flat if signed else flat.sqrt()
        most = flat.abs().amax(1, keepdim=True).clamp_min(1e-12)
        y = flat / most
        y = 127 * 2 * y / (1 + y.abs()) if signed else 255 * y
        self.quantized = (
            (y + 0.5).floor().reshape(-1)[: x.numel()].reshape(x.shape).to([torch.uint8, torch.int8][signed])
        )
        self.scales = most.reshape(-1).to(torch.float16)

    def is_quantized(self) -> bool:
        return True

    def numel(self) -> int:
        return int(self.quantized.numel())

    def materialize(self) -> Any:
        q, scales = self.quantized.reshape(-1).float(), self.scales.float().repeat_interleave(32)[: self.numel()]
        y = q / (127 if self._signed else 255)
        y = y / (2 - y.abs()) if self._signed else y
        return (y * scales if self._signed else (y * scales) ** 2).reshape(self.shape)


class Companded(torch.optim.Optimizer):
    """AdamW over such states; nothing of FlashOptim's is in it."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for h in self.param_groups:
            for p in h["params"]:
                s, (b1, b2) = self.state[p], h["betas"]
                t = s["step"] = s.get("step", 0) + 1
                m, v = (s[n].materialize() if n in s else torch.zeros_like(p) for n in ("exp_avg", "exp_avg_sq"))
                m, v = b1 * m + (1 - b1) * p.grad, b2 * v + (1 - b2) * p.grad**2
                p.mul_(1 - h["lr"] * h["weight_decay"])
                p.sub_(h["lr"] / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + h["eps"]))
                s["exp_avg"], s["exp_avg_sq"] = Stored(m, True), Stored(v, False)


def test_codes_and_scales_decode_to_what_the_library_reads() -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((33, 129)).astype(f32))
    for stored in (Stored(x, True), Stored(x**2, False)):
        c = torch_codes.of_companded(stored)
        want = stored.materialize().numpy().reshape(-1)
        np.testing.assert_allclose(decoded(c), want, rtol=1e-6, atol=0)


def test_its_step_is_followed_and_its_codes_are_those_of_the_records_codec() -> None:
    target = conform.TorchTarget(Companded, "companded")
    report = conform.run(target, "adamw", only=["L1", "L3", "L6", "L7"], dtypes=["float32"])
    (rule,) = [f for f in report.of("L1") if f.status == "pass"]
    assert rule.data["mode"] == "read"
    (codes,) = report.of("L3")
    assert codes.status == "pass", codes.text
    assert "m: compand8 signed" in codes.text and "v: compand8 unsigned" in codes.text
    (memory,) = report.of("L7")
    assert (memory.status, memory.text[:5]) == ("pass", "2.125")
    assert report.ids == {"state-lost"}, "under faint gradients a float16 scale is zero"


def test_a_step_of_the_bent_scale_beside_the_nearest_and_a_scale_that_is_another_blocks_are_told() -> None:
    x = np.random.default_rng(1).standard_normal(200).astype(f32)
    c = torch_codes.of_companded(Stored(torch.from_numpy(x), True))
    wrong = {
        "codes-not-nearest": c._replace(codes=c.codes + (np.arange(200) == 77).astype(np.uint8)),
        "scale-of-neighbour": c._replace(scales=np.roll(c.scales, 1)),
        "": c,
    }
    for id, stored in wrong.items():
        taken = Taken(0, 1, x, x, {}, x, {}, {"m": stored})
        assert [found[1] for found in judge(Run("read", "float32", [taken]), lambda p, g, s, t: (p, {"m": x}))] == [id]
