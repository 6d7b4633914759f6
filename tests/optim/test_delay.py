"""`place="host", delay=1`: the bits of the reference's delay, whatever backward had time to begin."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.optim import delayed
from refopt_cuda.optim.delayed import Delayed
from refopt_cuda.places import lanes
from tests.bits import same_bits
from tests.optim.pairs import HEAVY, PLAIN, Case, Mirror, exact, gradient, weights
from tests.optim.placed import ADAMW, ADAMW8, owned, params_of
from tests.optim.shuffled import Forgetful, ShuffledLanes
from tests.optim.test_checkpoints import through_a_file, twins

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")
SOME = [(64, 80), (33, 300), (40,), (), (0,)]
OPTIONS: dict[str, Any] = {"place": "host", "delay": 1}
IDLE = [(0, 1, 2, 3, 4), (0, 2), (1,), (0, 1, 2, 3, 4), (), (0, 1)]
"""Which parameters have a gradient in each step."""
IDLE_OF_THREE = [(0, 1, 2), (0, 2), (1,), (0, 1, 2)]


class Late(Mirror):
    """One parameter in the reference, with a delay."""

    def __init__(self, case: Case, param: Any, warm: int = 0, **codecs: str) -> None:
        super().__init__(case, param, **codecs)
        self.opt.delay, self.opt.warm = 1, warm

    def step(self, g: torch.Tensor | None) -> None:
        (p,), self.state = self.opt.step([self.p], [None if g is None else exact(g)], self.state)
        self.p = torch.from_numpy(p).to(self.dtype).float().numpy()

    def agrees(self, p: Any, state: dict[str, Any], what: str) -> None:
        super().agrees(p, state, what)
        waits = self.state[0].get("pending")
        assert (waits is None) == ("pending" not in state), f"{what}: what waits"
        if waits is not None:
            assert torch.equal(state["pending"].float(), torch.from_numpy(waits)), f"{what}: what waits"


def backward(params: Sequence[Any], grads: dict[int, torch.Tensor]) -> None:
    """Leaves these gradients, as autograd does it: hooks hear of them."""
    for p in params:
        p.grad = None
    if grads:
        sum((params[k] * g).sum() for k, g in grads.items()).backward()


def follow(opt: Any, mirrors: Sequence[Late], steps: Sequence[Sequence[int]], start: int = 0) -> None:
    params = params_of(opt)
    for t, live in enumerate(steps, start):
        grads = {k: gradient(params[k], 100 * t + k) for k in live}
        backward(params, grads)
        opt.step()
        agree(opt, mirrors, [grads.get(k) for k in range(len(params))], f"step {t + 1}")


def agree(opt: Any, mirrors: Sequence[Late], grads: Sequence[Any], what: str) -> None:
    seen = [exact(p) for p in params_of(opt)]  # before a look at the state, which waits for all copies
    for k, (p, mirror) in enumerate(zip(params_of(opt), mirrors, strict=True)):
        mirror.step(grads[k])
        same_bits(seen[k], mirror.p, f"{what}, tensor {k}: p")
        if opt.state.get(p):
            mirror.agrees(p, opt.state[p], f"{what}, tensor {k} {tuple(p.shape)}")


def finished(opt: Any, mirrors: Sequence[Late]) -> None:
    opt.finish()
    agree(opt, mirrors, [None] * len(mirrors), "finish")
    assert not any("pending" in opt.state[p] for p in params_of(opt))


def test_an_interrupted_step_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    opt = ADAMW.make(weights([(64, 80), (40,)], torch.float32, "cpu"), **OPTIONS)
    params = params_of(opt)
    grads = {k: gradient(p, k) for k, p in enumerate(params)}
    backward(params, grads)
    opt.step()
    backward(params, grads)

    def interrupted(jobs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(delayed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()
    jobs = [begun.job for begun in opt._home.begun.values()]
    assert len(jobs) == 2
    assert all(entry["step"] == 1 for entry in opt.state.values())  # a look at them waits
    assert all(job.done() for job in jobs) and not opt._home.begun


@pytest.mark.parametrize(("case", "dtype"), [(PLAIN[0], torch.float32), (ADAMW8, torch.bfloat16)], ids=str)
def test_a_delay_has_the_bits_of_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    """SGD has no states to keep, and waits all the same."""
    params = weights(SOME, dtype, device)
    mirrors = [Late(case, p) for p in params]
    opt = case.make(params, **OPTIONS)
    follow(opt, mirrors, IDLE)
    finished(opt, mirrors)
    follow(opt, mirrors, IDLE[:2], 9)


def test_a_step_shows_the_gradient_of_the_step_before(device: str) -> None:
    """With gradients that do not depend on the weights it is the plain run, one step late."""
    one, two = weights(SOME, torch.float32, device), weights(SOME, torch.float32, device)
    plain, late = ADAMW8.make(one), ADAMW8.make(two, **OPTIONS)
    seen = [[p.detach().clone() for p in two]]
    for t in range(4):
        for params, opt in ((one, plain), (two, late)):
            backward(params, {k: gradient(p, 100 * t + k) for k, p in enumerate(params)})
            opt.step()
        assert all(torch.equal(p, q) for p, q in zip(two, seen[-1], strict=True)), f"step {t + 1}"
        seen.append([p.detach().clone() for p in one])
    late.finish()
    assert all(torch.equal(p, q) for p, q in zip(two, one, strict=True))


@pytest.mark.parametrize("warm", [1, 3])
def test_the_first_steps_may_be_without_delay(warm: int, device: str) -> None:
    params = weights(SOME, torch.float32, device)
    opt = ADAMW8.make(params, **OPTIONS, warm=warm)
    follow(opt, mirrors := [Late(ADAMW8, p, warm) for p in params], IDLE)
    finished(opt, mirrors)


def test_the_host_steps_while_backward_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """All updates have been begun by the first gradient of the next backward pass, and `step` begins none."""
    begun: list[int] = []
    begin = Delayed.start

    def counted(self: Any, work: Any, *args: Any) -> None:
        before = len(self.begun)
        begin(self, work, *args)
        begun.append(len(self.begun) - before)

    monkeypatch.setattr(Delayed, "start", counted)
    params = weights(SOME, torch.float32, "cpu")
    opt = ADAMW8.make(params, **OPTIONS)
    follow(opt, [Late(ADAMW8, p) for p in params], [range(5), range(5)])
    assert begun == [5, 0], "in backward, and in step"


def test_without_hooks_the_step_does_it_all(device: str) -> None:
    """Gradients that somebody has put there."""
    params = weights(SOME, torch.float32, device)
    opt, mirrors = ADAMW8.make(params, **OPTIONS), [Late(ADAMW8, p) for p in params]
    for t in range(3):
        grads = [gradient(p, 100 * t + k) for k, p in enumerate(params)]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        opt.step()
        agree(opt, mirrors, grads, f"step {t + 1}")


def test_gradients_may_be_added_up_and_clipped(device: str) -> None:
    params = weights(SOME[:3], torch.float32, device)
    opt, mirrors = ADAMW.make(params, **OPTIONS), [Late(ADAMW, p) for p in params]
    for t in range(3):
        backward(params, {k: gradient(p, 100 * t + k) for k, p in enumerate(params)})
        sum((p * 0.5).sum() for p in params).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(params, 0.7)
        grads = [p.grad.clone() for p in params]
        opt.step()
        agree(opt, mirrors, grads, f"step {t + 1}")


def test_a_rate_that_changes_is_that_of_the_step_that_applies(device: str) -> None:
    params = weights(SOME, torch.float32, device)
    opt, mirrors = ADAMW8.make(params, **OPTIONS), [Late(ADAMW8, p) for p in params]
    for t, lr in enumerate((0.1, 0.02, 0.003)):
        opt.param_groups[0]["lr"] = lr
        for mirror in mirrors:
            mirror.opt.hyper["lr"] = lr
        follow(opt, mirrors, [range(5)], t)


def test_groups_have_their_own_settings(device: str) -> None:
    other = ADAMW8._replace(words=ADAMW8.words | {"lr": 0.3, "betas": (0.7, 0.9)})
    params = weights(SOME[:3], torch.float32, device)
    groups = [{"params": params[:1]}, {"params": params[1:], **other.words}]
    opt = rc.optim.AdamW8bit(groups, **ADAMW8.words, **OPTIONS)
    mirrors = [Late(ADAMW8, params[0]), *[Late(other, p) for p in params[1:]]]
    follow(opt, mirrors, [(0, 1, 2), (1, 2), (0, 1), (0, 1, 2)])
    finished(opt, mirrors)


def test_float32_weights_on_the_host_for_bfloat16_ones(device: str) -> None:
    """ZeRO-Offload's set-up: what the device sees of a weight, and the rest of it."""
    params = weights(SOME[:3], torch.bfloat16, device)
    codecs = {"p": "bf16_rem16", "v": "q4:64"}
    opt = ADAMW.make(params, **OPTIONS, codecs=codecs)
    follow(opt, [Late(ADAMW, p, **codecs) for p in params], IDLE_OF_THREE)


def test_parameters_in_another_order_are_stepped_through_a_copy(device: str) -> None:
    (p,) = weights([(96, 64)], torch.float32, device)
    p.data = p.detach().clone().t().contiguous().t()
    follow(ADAMW8.make([p], **OPTIONS), [Late(ADAMW8, p)], [(0,)] * 3)


def test_any_order_that_the_events_allow_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(4):
        monkeypatch.setattr(lanes, "lanes_of", lambda kind, device, seed=seed: ShuffledLanes(seed, lanes.STEP))
        params = weights(SOME[:3], torch.bfloat16, "cpu")
        opt = ADAMW8.make(params, **OPTIONS)
        follow(opt, [Late(ADAMW8, p) for p in params], IDLE_OF_THREE)


@pytest.mark.parametrize("lane", [lanes.OUT, lanes.STEP])
def test_an_event_that_is_not_waited_for_shows(lane: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "lanes_of", lambda kind, device: Forgetful(2, lanes.STEP, lane, host=lane == lanes.OUT))
    params = weights(SOME[:2], torch.float32, "cpu")
    with pytest.raises(AssertionError):
        follow(ADAMW8.make(params, **OPTIONS), [Late(ADAMW8, p) for p in params], [(0, 1)] * 4)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_a_checkpoint_holds_the_gradient_that_waits(device: str) -> None:
    params = weights(SOME, torch.bfloat16, device)
    opt, mirrors = ADAMW8.make(params, **OPTIONS), [Late(ADAMW8, p) for p in params]
    follow(opt, mirrors, [range(5)] * 2)
    saved = through_a_file(opt.state_dict())
    assert torch.equal(saved["state"][0]["pending"].cpu(), params[0].grad.cpu())
    again = ADAMW8.make(twins(params, device), **OPTIONS)
    again.load_state_dict(saved)
    follow(again, copy.deepcopy(mirrors), [range(5), (1,), range(5)], 7)
    assert all(owned(again))
    opt.load_state_dict(saved)
    follow(opt, mirrors, [range(5), (1,), range(5)], 7)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_of_the_optimizer_is_late_too(way: Callable[[Any], Any]) -> None:
    params = weights(SOME[:3], torch.float32, "cpu")
    opt, mirrors = ADAMW8.make(params, **OPTIONS), [Late(ADAMW8, p) for p in params]
    follow(opt, mirrors, IDLE_OF_THREE)
    other = way(opt)
    follow(other, copy.deepcopy(mirrors), IDLE_OF_THREE, 9)
    follow(opt, mirrors, IDLE_OF_THREE, 9)


def test_a_look_at_the_state_after_backward_finds_the_update_done() -> None:
    params = weights(SOME[:3], torch.float32, "cpu")
    opt, mirrors = ADAMW8.make(params, **OPTIONS), [Late(ADAMW8, p) for p in params]
    follow(opt, mirrors, [(0, 1, 2)] * 2)
    grads = {k: gradient(p, 77 + k) for k, p in enumerate(params)}
    backward(params, grads)
    assert all("pending" not in opt.state[p] and opt.state[p]["step"] == 2 for p in params)
    opt.step()
    agree(opt, mirrors, [grads[k] for k in range(3)], "after the look")


def test_a_step_that_a_scaler_skips_loses_its_own_gradients_alone() -> None:
    params = weights(SOME[:3], torch.float32, "cpu")
    opt, mirrors = ADAMW8.make(params, **OPTIONS), [Late(ADAMW8, p) for p in params]
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=100)
    for t in range(5):
        grads = {k: gradient(p, 100 * t + k) for k, p in enumerate(params)}
        scaler.scale(torch.ones(()))
        backward(params, {k: g * scaler.get_scale() for k, g in grads.items()})
        if t == 2:
            params[0].grad[0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
        if t != 2:
            agree(opt, mirrors, [grads[k] for k in range(3)], f"step {t + 1}")


@pytest.mark.gpu
def test_backward_reads_the_old_weights_to_its_end() -> None:
    """New ones go up behind all that was enqueued before the step; gradients come down behind what makes them."""
    params = weights([(256, 256)], torch.float32, "cuda")
    opt, mirrors = ADAMW8.make(params, **OPTIONS), [Late(ADAMW8, p) for p in params]
    follow(opt, mirrors, [(0,)] * 2)
    old, g = params[0].detach().clone(), gradient(params[0], 7)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)
    backward(params, {0: g})
    read = params[0].detach() * 1.0
    opt.step()
    params[0].grad = None
    torch.empty_like(old).fill_(float("nan"))  # the memory of the gradient, if it were free
    assert torch.equal(read, old)
    agree(opt, mirrors, [g], "after a slow backward")


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"delay": 2, "place": "host"}, r"AdamW8bit: delay must be 0 or 1, got 2"),
        ({"delay": True, "place": "host"}, r"AdamW8bit: delay must be 0 or 1, got True"),
        ({"delay": 1}, r"AdamW8bit: delay=1 is of place='host', and place is 'resident'"),
        ({**OPTIONS, "during_backward": True}, r"AdamW8bit: with delay=1 the host steps during the next backward"),
        ({**OPTIONS, "resident_bytes": 5}, r"AdamW8bit: with delay=1 whole tensors .*no resident_bytes, got 5"),
        ({**OPTIONS, "page_bytes": 5}, r"AdamW8bit: with delay=1 whole tensors .*no page_bytes, got 5"),
        ({**OPTIONS, "warm": -1}, r"AdamW8bit: warm must be a whole number >= 0, got -1"),
        ({"place": "host", "warm": 2}, r"AdamW8bit: warm is of delay=1, and delay is 0"),
        ({**OPTIONS, "max_grad_norm": 1.0}, r"AdamW8bit: max_grad_norm needs every gradient's norm before a step"),
        ({**OPTIONS, "capturable": True}, r"AdamW8bit: capturable is of place='resident', and place is 'host'"),
    ],
)
def test_what_a_delay_cannot_be_with_is_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        rc.optim.AdamW8bit(weights([(4,)], torch.float32, "cpu"), **options)


def test_a_gradient_that_waits_is_not_loaded_where_none_can() -> None:
    params = weights([(64, 80), (40,)], torch.float32, "cpu")
    opt = ADAMW8.make(params, **OPTIONS)
    backward(params, {0: gradient(params[0], 0), 1: gradient(params[1], 1)})
    opt.step()
    saved = opt.state_dict()
    plain = ADAMW8.make(twins(params, "cpu"))
    with pytest.raises(refopt.StateError, match=r"state\[0\] has a gradient that waits, and this optimizer no delay"):
        plain.load_state_dict(saved)
    saved["state"][1]["pending"] = torch.zeros(41)
    with pytest.raises(refopt.ShapeError, match=r"state\[1\]: 'pending' has shape \(41,\), it must have \(40,\)"):
        opt.load_state_dict(saved)


def test_weights_that_are_replaced_during_backward_are_refused() -> None:
    params = weights([(64, 80)], torch.float32, "cpu")
    opt = ADAMW8.make(params, **OPTIONS)
    for _ in range(2):
        backward(params, {0: gradient(params[0], 0)})
        opt.step()
    backward(params, {0: gradient(params[0], 1)})
    params[0].data = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"AdamW8bit\.step: a parameter or a state was replaced between backward"):
        opt.step()


def test_finish_without_a_delay_does_nothing() -> None:
    params = weights([(40,)], torch.float32, "cpu")
    opt = Case("SGD", "sgd", HEAVY).make(params)
    params[0].grad = gradient(params[0], 0)
    before = params[0].detach().clone()
    opt.finish()
    assert torch.equal(params[0], before) and params[0].grad is not None


def test_hooks_go_with_the_optimizer() -> None:
    params = weights([(40,)], torch.float32, "cpu")
    opt = ADAMW8.make(params, **OPTIONS)
    assert params[0]._post_accumulate_grad_hooks
    del opt
    gc.collect()
    assert not params[0]._post_accumulate_grad_hooks
