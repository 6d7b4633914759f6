"""What the suite finds in other libraries without being told. torch is always here; others where they are installed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from refopt import conform
from tests.conform.peers import PEERS, Peer, importable

torch = pytest.importorskip("torch")


def name(peer: Any) -> str:
    return f"{peer.target}-{peer.claim}"


@pytest.mark.parametrize("peer", PEERS, ids=name)
def test_a_peer_is_found_to_do_what_it_does(peer: Peer) -> None:
    if reason := importable(peer.target.partition(":")[0]):
        pytest.skip(reason)
    report = conform.run(peer.target, peer.claim, **peer.options)
    keys = {f.key for f in report.findings}
    assert set(peer.finds) <= keys, "\n".join(map(str, report.findings))
    assert report.seconds < 50
    if not peer.finds:
        assert not [f for f in report.findings if f.status == "fail" and "@" not in f.setting], report.text()


def test_torchs_lerp_is_named_with_its_share_of_equal_bits() -> None:
    (found,) = conform.run("torch.optim:AdamW", "adamw", only=["L1"], dtypes=["float32"]).findings[:1]
    assert found.id == "lerp"
    forms = {f["state"]: f for f in found.data["forms"]}
    assert forms["m"]["id"].startswith("lerp")
    assert forms["m"]["equal"] > 0.99 > 0.8 > forms["m"]["as_written"]


def test_options_reach_the_constructor() -> None:
    target = conform.TorchTarget(torch.optim.Adam, decoupled_weight_decay=True)
    assert conform.run(target, "adam", only=["L1"], dtypes=["float32"]).ids == {"decay-decoupled"}
    assert conform.run(target, "adam(decay=decoupled)", only=["L1"], dtypes=["float32"]).ok


def test_a_torch_optimizer_of_ones_own_needs_no_adapter() -> None:
    class Lion(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float, betas: Any = (0.9, 0.99), weight_decay: float = 0.0) -> None:
            super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

        @torch.no_grad()
        def step(self) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                    b1, b2 = group["betas"]
                    c = m * b1 + p.grad * (1 - b1)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * c.sign())
                    m.mul_(b2).add_(p.grad * (1 - b2))

    report = conform.run(conform.TorchTarget(Lion), "lion", dtypes=["float32"])
    assert report.ok, report.text()
    assert next(f for f in report.of("L1")).data["mode"] == "forced"


def test_a_state_under_an_unknown_name_is_not_taken_for_forced() -> None:
    class Odd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p]["elsewhere"] = torch.zeros_like(p)

    found = conform.run(conform.TorchTarget(Odd), "sgd", only=["L1"], dtypes=["float32"]).of("L1")[0]
    assert found.data["mode"] == "read"


def test_place_is_compared_with_none() -> None:
    """L4 with refopt_cuda's drop-ins where they take a place; a target whose place changes bits is told."""

    class Shifty(conform.FunctionalTarget):
        place = "paged"

        def resident(self) -> conform.Target:
            return conform.FunctionalTarget(self.init, right)

    def right(p: Any, g: Any, s: Any, *, t: int, lr: float, wd: float) -> Any:
        return p - np.float32(lr) * (g + np.float32(wd) * p), {}

    def stale(p: Any, g: Any, s: Any, *, t: int, lr: float, wd: float) -> Any:
        return right(p, g, s, t=t, lr=lr * (1 + (t > 2) * 1e-6), wd=wd)

    honest = conform.run(Shifty(lambda p: {}, right), "sgd", only=["L4"])
    assert [f.status for f in honest.of("L4")] == ["pass"]
    assert conform.run(Shifty(lambda p: {}, stale), "sgd", only=["L4"]).ids == {"place-changes-bits"}
