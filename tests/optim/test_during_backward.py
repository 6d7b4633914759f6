"""`during_backward=True`: pages are stepped as gradients arrive, with the same bits; what it cannot bear is refused."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

import refopt_cuda as rc
from refopt_cuda.optim import hosting, paging
from refopt_cuda.optim.hosting import Hosted
from refopt_cuda.optim.paging import Paged
from refopt_cuda.places import lanes
from tests.optim.placed import (
    ADAMW8,
    backward,
    model,
    pages_of,
    trained,
)
from tests.optim.shuffled import ShuffledLanes

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_decay is coupled")


@pytest.fixture(params=["paged", "host"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Either place; CPU weights go down and up as a GPU's would."""
    monkeypatch.setattr(Hosted, "rehearsal", True)
    return str(request.param)


def twins(place: str, size: int) -> tuple[list[Any], Any, Any]:
    """A model twice, an optimizer with states beside the weights, and one that steps pages of so many bytes early."""
    nets = [model() for _ in range(2)]
    one = rc.optim.AdamW8bit(nets[0].parameters(), **ADAMW8.words)
    words = ADAMW8.words | {"place": place, "page_bytes": size, "during_backward": True}
    return nets, one, rc.optim.AdamW8bit(nets[1].parameters(), **words)


@pytest.mark.parametrize("size", [1, 3000, 1 << 30])
def test_steps_during_backward_have_the_same_bits(
    size: int, place: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = {"paged": Paged, "host": Hosted}[place]
    monkeypatch.setattr(home, "early", counted := Counted(home.early))
    nets = [model(device=device) for _ in range(2)]
    words = ADAMW8.words | {"min_8bit_size": 1000}
    one = rc.optim.AdamW8bit(nets[0].parameters(), **words)
    two = rc.optim.AdamW8bit(nets[1].parameters(), **words, place=place, page_bytes=size, during_backward=True)
    for net, opt in zip(nets, (one, two), strict=True):
        trained(net, opt, 4)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and one.state[p]["step"] == two.state[q]["step"] == 4
        assert all(torch.equal(x.cpu(), two.state[q][k]) for k, x in one.state[p].items() if torch.is_tensor(x))
    assert counted.calls == 3 * len(pages_of(two)), "every page of every step but the first was stepped in backward"


def test_any_order_that_the_events_allow_gives_the_same_bits(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are NaN as soon as they are free; the thread of the host runs beside the hooks."""
    poisons = lanes.OUT if place == "paged" else lanes.IN
    for seed in range(2):
        monkeypatch.setattr(lanes, "lanes_of", lambda kind, device, seed=seed: ShuffledLanes(seed, poisons))
        nets, one, two = twins(place, 3000)
        for net, opt in zip(nets, (one, two), strict=True):
            trained(net, opt, 3)
        assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True)), seed


class Late(ShuffledLanes):
    """Nothing is done before somebody asks for it."""

    made: ClassVar[list[Late]] = []

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.made.append(self)

    @property
    def waiting(self) -> int:
        return sum(map(len, self.queues))


def test_hooks_wait_for_no_page_and_backward_ends_behind_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "lanes_of", Late)
    monkeypatch.setattr(Late, "made", [])
    net, waiting = model(), list[int]()
    opt = rc.optim.AdamW8bit(net.parameters(), place="paged", page_bytes=3000, during_backward=True)
    trained(net, opt, 1)
    (one,), (deck,) = Late.made, opt._home.decks.values()
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda p: waiting.append(one.waiting))
        p.register_post_accumulate_grad_hook(lambda p: waiting.append(deck.coming is not None))
    before = [p.detach().clone() for p in net.parameters()]
    opt.zero_grad()
    backward(net, 1)
    queued, coming = waiting[::2], waiting[1::2]
    assert queued == sorted(queued) and queued[-1] > 100, "a hook waited for pages"
    assert any(coming) and deck.coming is None
    assert not one.queues[lanes.STEP], "backward is over, and steps are not"
    assert not any(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_gradients_that_are_freed_in_backward_are_held_until_the_next_page_comes() -> None:
    nets, one, two = twins("paged", 1)
    trained(nets[0], one, 2)
    trained(nets[1], two, 1)
    grads, alive = list[Any](), list[int]()

    def freed(p: torch.Tensor) -> None:
        grads.append(weakref.ref(p.grad.untyped_storage()))
        p.grad = None
        alive.append(sum(ref() is not None for ref in grads))

    for p in nets[1].parameters():
        p.register_post_accumulate_grad_hook(freed)
    two.zero_grad()
    backward(nets[1], 1)
    assert alive == [1] * len(grads) and not any(ref() for ref in grads)
    two.step()
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_a_page_that_comes_to_the_place_of_another_finds_it_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients need not arrive in the order of pages: here every second page comes to the place of the one before."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    for seed in range(3):
        monkeypatch.setattr(lanes, "lanes_of", lambda kind, device, seed=seed: ShuffledLanes(seed))
        torch.manual_seed(0)
        nets = [torch.nn.Sequential(*(torch.nn.Linear(80, 80, bias=False) for _ in order)) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        params = [[net[k].weight for k in order] for net in nets]
        one = rc.optim.AdamW8bit(params[0], **ADAMW8.words)
        words = ADAMW8.words | {"place": "paged", "page_bytes": 80 * (80 + 4) * 2, "during_backward": True}
        two = rc.optim.AdamW8bit(params[1], **words)
        for net, opt in zip(nets, (one, two), strict=True):
            trained(net, opt, 3)
        assert [len(page.pieces) for page in pages_of(two)] == [1] * len(order)
        assert all(torch.equal(p, q) for p, q in zip(*params, strict=True)), seed


def test_an_error_in_backward_leaves_steps_that_the_next_step_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody hears of the end of such a pass."""
    monkeypatch.setattr(lanes, "lanes_of", Late)
    nets, one, two = twins("paged", 3000)
    for net, opt in zip(nets, (one, two), strict=True):
        trained(net, opt, 2)
        opt.zero_grad()
        broken = net[2].weight.register_post_accumulate_grad_hook(lambda p: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            backward(net, 2)
        broken.remove()
        opt.step()
        assert opt is one or not two._early.passing
        trained(net, opt, 2)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and one.state[p]["step"] == two.state[q]["step"] >= 4


def test_a_step_that_raises_within_backward_is_taken_by_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises in the hook of a later parameter, whose own pages have not come."""
    nets, real, calls = [model() for _ in range(2)], paging.on_host, list[Any]()

    def once(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError("no room")
        real(*args)

    one = rc.optim.AdamW8bit(nets[0].parameters(), **ADAMW8.words)
    words = ADAMW8.words | {"place": "paged", "page_bytes": 3000, "during_backward": True}
    two = rc.optim.AdamW8bit(nets[1].parameters(), **words)
    for net, opt in zip(nets, (one, two), strict=True):
        trained(net, opt, 1)
        opt.zero_grad()
        if opt is two:
            monkeypatch.setattr(paging, "on_host", once)
            with pytest.raises(MemoryError, match="no room"):
                backward(net, 1)
        else:
            backward(net, 1)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        p.grad = None if q.grad is None else p.grad
    one.step()
    two.step()
    assert sum(p.grad is not None for p in nets[0].parameters()) > 1
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and one.state[p]["step"] == two.state[q]["step"]


def test_states_may_be_looked_at_while_a_page_is_on_its_way(place: str) -> None:
    nets, one, two = twins(place, 1)
    for net, opt in zip(nets, (one, two), strict=True):
        trained(net, opt, 1)

    def look(p: torch.Tensor) -> None:
        assert two.state_dict()["state"]
        assert all(deck.coming is None for deck in two._home.decks.values()), "a state that is shown is an old one"

    for p in nets[1].parameters():
        p.register_post_accumulate_grad_hook(look)
    for net, opt in zip(nets, (one, two), strict=True):
        trained(net, opt, 2)
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


class Counted:
    """A method that counts its calls; what it is called on comes first in `args`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.calls = call, 0

    def __get__(self, owner: Any, cls: Any = None) -> Any:
        def bound(*args: Any) -> Any:
            self.calls += 1
            return self.call(owner, *args)

        return bound


def test_what_the_thread_of_the_host_raises_is_raised_by_the_step(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if place == "paged":
        pytest.skip("paged steps have no thread")
    net = model()
    opt = rc.optim.AdamW8bit(net.parameters(), place=place, page_bytes=1, during_backward=True)
    trained(net, opt, 1)

    def broken(*args: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(hosting, "on_host", broken)
    backward(net, 1)
    with pytest.raises(MemoryError, match="no room"):
        opt.step()


def test_a_gradient_may_be_gone_before_the_step(place: str) -> None:
    """What torch's optimizer-in-backward does to save the memory of gradients."""
    nets, one, two = twins(place, 1)
    trained(nets[0], one, 3)
    trained(nets[1], two, 1)
    for t in (1, 2):
        two.zero_grad()
        backward(nets[1], t)
        two.zero_grad()
        two.step()
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and two.state[q]["step"] == 3


def test_pages_whose_gradients_do_not_all_arrive_are_left_to_the_step(place: str) -> None:
    nets, one, two = twins(place, 50_000)
    for net, opt in zip(nets, (one, two), strict=True):
        trained(net, opt, 2)
        net[2].requires_grad_(False)
        trained(net, opt, 2)
        net[2].requires_grad_(True)
        trained(net, opt, 2)
    for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, q) and one.state[p]["step"] == two.state[q]["step"]


def test_clipping_is_refused_before_anything_is_changed() -> None:
    net = model()
    opt = rc.optim.PagedAdamW8bit(net.parameters(), during_backward=True)
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(RuntimeError, match=r"PagedAdamW8bit\.step: .*changed after backward.*nothing has been stepped"):
        trained(net, opt, 1, lambda: torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0))
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True)) and not opt.state


def test_a_gradient_that_is_gone_before_it_was_stepped_with_is_missed() -> None:
    """States that stay on the device wait for the step."""
    net = model()
    opt = rc.optim.PagedAdamW8bit(net.parameters(), during_backward=True, resident_bytes=30_000)
    trained(net, opt, 1)
    opt.zero_grad()
    backward(net, 1)
    opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"PagedAdamW8bit\.step: .*changed after backward.*nothing has been stepped"):
        opt.step()


def test_a_scaler_is_refused() -> None:
    net = model()
    opt = rc.optim.PagedAdamW8bit(net.parameters(), during_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net(torch.ones(2, 80)).sum()).backward()
    with pytest.raises(RuntimeError, match="GradScaler and accumulation need during_backward=False"):
        scaler.step(opt)
    assert not opt.state


def test_a_second_backward_before_the_step_is_refused() -> None:
    net = model()
    opt = rc.optim.PagedAdamW8bit(net.parameters(), during_backward=True)
    trained(net, opt, 1)
    opt.zero_grad()
    backward(net, 1)
    with pytest.raises(RuntimeError, match=r"PagedAdamW8bit: a second gradient .* every backward pass is a step"):
        backward(net, 2)


def test_hooks_go_with_the_optimizer() -> None:
    net = model()
    opt = rc.optim.PagedAdamW8bit(net.parameters(), during_backward=True)
    del opt
    gc.collect()
    assert not any(p._post_accumulate_grad_hooks for p in net.parameters())
