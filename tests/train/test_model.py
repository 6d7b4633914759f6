"""The transformer: causal, rotary, and of the size it says."""

from __future__ import annotations

import pytest
import torch

from refopt_cuda.train.model import Sizes, build, rotate, rotation

SIZES = Sizes(layers=2, width=32, heads=2, hidden=48, context=24)


def test_it_has_as_many_weights_as_its_sizes_say() -> None:
    sizes = Sizes(3, 32, 4, 40, 8)
    assert sum(p.numel() for p in build(sizes, 0).parameters()) == sizes.parameters()


def test_no_byte_sees_a_later_one() -> None:
    model = build(SIZES, 0)
    x = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(0))
    other = x.clone()
    other[0, 15:] = (other[0, 15:] + 1) % 256
    a, b = model(x), model(other)
    assert torch.allclose(a[0, :15], b[0, :15], atol=1e-5)
    assert not torch.allclose(a[0, 15:], b[0, 15:], atol=1e-2)


def test_rotary_products_depend_on_distance_alone() -> None:
    cos, sin = rotation(32, 8)
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    turned = [rotate(v.expand(1, 1, 32, 8), cos, sin)[0, 0] for v in (q, k)]
    products = turned[0] @ turned[1].T
    for distance in (0, 3, 9):
        line = products.diagonal(-distance)
        assert torch.allclose(line, line[0].expand_as(line), atol=1e-4)
    assert (products.diagonal(-3)[0] - products.diagonal(-9)[0]).abs() > 1e-3


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    a, b, c = build(SIZES, 3), build(SIZES, 3), build(SIZES, 4)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


@pytest.mark.parametrize(
    ("words", "says"),
    [({"layers": 0}, "layers"), ({"heads": 3}, "multiple of heads"), ({"heads": 32}, "even")],
)
def test_impossible_sizes_are_refused(words: dict[str, int], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Sizes(**({"layers": 1, "width": 32, "heads": 2, "hidden": 8, "context": 8} | words))
