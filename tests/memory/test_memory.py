"""Memory: what is said beforehand is what is there, to the byte; and the published sums come out."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bits import parts
from tests.cases import CODECS, EVERY, WEIGHTS, CodecCase, RuleCase, label
from tests.places.laws import some_codecs
from tests.strategies import SHAPES, f32

every_rule = pytest.mark.parametrize("case", EVERY, ids=label)
BILLION = [(7500, 1_000_000)]


def held(state: list[dict[str, Any]]) -> int:
    return sum(a.nbytes for s in state for n, x in s.items() if n != "t" for a in parts(x).values())


def per(ref: ModuleType, opt: Any, **options: Any) -> float:
    """Bytes a weight of one large matrix, rounded to a thousandth."""
    shape = (4096, 4096)
    need = ref.memory.train([shape], opt, **options)
    return round((need.total - need.scratch) / math.prod(shape), 3)


@every_rule
@given(data=st.data())
def test_predicted_bytes_are_the_bytes_of_the_states(ref: ModuleType, case: RuleCase, data: Any) -> None:
    shapes = data.draw(st.lists(st.sampled_from(list(case.shapes or SHAPES)), max_size=4))
    small = data.draw(st.sampled_from([0, 40]))
    opt = case.optimizer(ref, some_codecs(ref, case, data), min_size=small)
    params = [np.ones(s, f32) for s in shapes]
    _, state = opt.step(params, params, opt.init(params))
    assert ref.memory.states(opt, shapes) == held(opt.init(params)) == held(state)


@pytest.mark.parametrize("codec", CODECS, ids=label)
@every_rule
def test_every_rule_with_every_codec_is_predicted(ref: ModuleType, case: RuleCase, codec: CodecCase) -> None:
    records = {s.name: s for s in ref.rules.RULES[case.stem].states}
    takes = [s for s in case.states if records[s].dtype == f32 and (codec.signed or records[s].nonnegative)]
    opt = case.optimizer(ref, {s: codec.record(ref) for s in takes})
    shapes = list(case.shapes or [(2, 100), (129,), (5, 3), (0,), ()])
    assert ref.memory.states(opt, shapes) == held(opt.init([np.ones(s, f32) for s in shapes]))


@pytest.mark.parametrize("weights", WEIGHTS, ids=label)
def test_what_a_format_of_weights_keeps_is_predicted(ref: ModuleType, weights: CodecCase) -> None:
    opt = ref.Optimizer("adamw", {"p": weights.record(ref), "v": "dynamic8"})
    shapes = [(3, 100), (257,), ()]
    assert ref.memory.states(opt, shapes) == held(opt.init([np.ones(s, f32) for s in shapes]))


def test_a_pending_gradient_is_predicted(ref: ModuleType) -> None:
    opt, p = ref.Optimizer("adamw", "dynamic8", delay=1), [np.ones((3, 100), f32)]
    _, state = opt.step(p, p, opt.init(p))
    assert ref.memory.states(opt, [(3, 100)]) == held(state)


@every_rule
@given(data=st.data(), ranks=st.sampled_from([1, 2, 5]))
def test_no_rank_holds_more_than_its_share_and_a_tensor(ref: ModuleType, case: RuleCase, ranks: int, data: Any) -> None:
    """Rules that see whole tensors own them whole; the others differ from the even share by a block at each end."""
    shapes = data.draw(st.lists(st.sampled_from(list(case.shapes or SHAPES)), min_size=1, max_size=6))
    opt = case.optimizer(ref, some_codecs(ref, case, data))
    part = ref.Partition(opt, [np.zeros(s, f32) for s in shapes], ranks, 3)
    total, size = ref.memory.states(opt, shapes), sum(map(math.prod, shapes))
    shares = [part.held(rank)["states"] for rank in range(ranks)]
    each = ref.memory.share(total, size, ranks, opt.block)
    assert sum(shares) == total <= each * ranks
    largest = max(sum(ref.memory.state_of(opt, s).values()) for s in shapes)
    assert ranks > 1 or shares == [each]
    assert part.size == 0 or opt.rule.scope != "element" or max(shares) <= each + 2 * largest


@given(data=st.data())
def test_bytes_add_up_over_tensors(ref: ModuleType, data: Any) -> None:
    shapes = data.draw(st.lists(st.sampled_from(SHAPES), max_size=8))
    cut = data.draw(st.integers(0, len(shapes)))
    opt = ref.Optimizer("adamw", "q4")
    apart = ref.memory.states(opt, shapes[:cut]) + ref.memory.states(opt, shapes[cut:])
    assert ref.memory.states(opt, shapes) == apart


def test_more_of_anything_takes_no_less(ref: ModuleType) -> None:
    model, opt = ref.models.named("gpt2"), ref.Optimizer("adamw", {"p": "bf16"})
    plain = {"batch": 2, "sequence": 128}
    least = ref.memory.train(model, opt, **plain).total
    for more in ({"batch": 3}, {"sequence": 129}, {"flash": False}, {"master": True}, {"gradient_bytes": 4}):
        assert ref.memory.train(model, opt, **(plain | more)).total > least, more
    for less in ({"release": True}, {"checkpoint": True}, {"ranks": 2}, {"ranks": 2, "stage": 3}, {"lora": 8}):
        assert ref.memory.train(model, opt, **(plain | less)).total < least, less


STATES = {
    "sgd": 0, "lion": 4, "signum": 4, "muon": 4, "rmsprop": 4, "adagrad": 4, "adam": 8, "adamw": 8, "lamb": 8,
    "schedule_free": 8, "ademamix": 12, "adafactor": 0.002, "sm3": 0.002, "adam_mini": 4.001, "came": 4.004,
}  # fmt: skip


@pytest.mark.parametrize("stem", STATES)
def test_states_of_a_rule_take_what_its_paper_says(ref: ModuleType, stem: str) -> None:
    """Bytes a weight of a 4096 x 4096 matrix in float32; SM3 without its momentum."""
    opt = ref.Optimizer(stem, **({"momentum": 0.0} if stem == "sm3" else {}))
    assert ref.memory.states(opt, [(4096, 4096)]) / 4096**2 == pytest.approx(STATES[stem], abs=6e-4)


CODED = {"dynamic8": 2.03125, "q4": 1.0625, "compand8": 2.125, "fp8_expand": 2.1875}


@pytest.mark.parametrize("stem", CODED)
def test_coded_states_of_adamw_take_what_their_papers_say(ref: ModuleType, stem: str) -> None:
    opt = ref.Optimizer("adamw", stem)
    assert ref.memory.states(opt, [(4096, 4096)]) / 4096**2 == pytest.approx(CODED[stem], abs=0.06)


def test_a_whole_step_takes_the_known_bytes_a_weight(ref: ModuleType) -> None:
    bf16, states = {"p": "bf16"}, ("m", "v")
    assert per(ref, ref.Optimizer("adam")) == 16
    assert per(ref, ref.Optimizer("adam", bf16), master=True) == 16
    assert per(ref, ref.Optimizer("adam", bf16)) == 12
    assert per(ref, ref.Optimizer("adam", bf16 | dict.fromkeys(states, "bf16"))) == 8
    assert per(ref, ref.Optimizer("adam", bf16 | dict.fromkeys(states, "dynamic8"))) == 6.031
    exact = ref.Optimizer("adam", {"p": "bf16_ecc"} | dict.fromkeys(states, "compand8"))
    assert 7.0 < per(ref, exact) < 7.3
    assert ref.memory.train([(4096, 4096)] * 100, exact, release=True).gradients == 2 * 4096**2


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)])
def test_zero_comes_to_the_sums_of_its_paper(ref: ModuleType, stage: int, gigabytes: float) -> None:
    """Rajbhandari et al., figure 1: 7.5e9 weights, 64 ranks, 2 + 2 + 12 bytes."""
    opt = ref.Optimizer("adam", {"p": "bf16"})
    need = ref.memory.train(BILLION, opt, master=True, ranks=64 if stage else 1, stage=stage or 1)
    assert round(need.total / 1e9, 1) == gigabytes


PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824, "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248, "llama-2-13b": 13_015_864_320, "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672, "llama-2-70b": 68_976_648_192, "llama-3-70b": 70_553_706_496,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_weights_that_were_published(ref: ModuleType, name: str) -> None:
    assert ref.models.named(name).size == PUBLISHED[name]


QLORA = {
    # name: frozen, adapters, their weights, gradients and states, activations; decimal GB
    "llama-2-7b": (3.866, 159_907_840, 1.919, 0.38),
    "llama-2-13b": (7.201, 250_347_520, 3.004, 0.47),
    "llama-33b": (17.414, 487_587_840, 5.851, 0.70),
    "llama-65b": (34.459, 799_539_200, 9.594, 0.99),
}


@pytest.mark.parametrize("name", QLORA)
def test_qlora_fits_where_its_paper_says(ref: ModuleType, name: str) -> None:
    """Dettmers et al., arXiv 2305.14314: rank 64 on all matrices, double quantization, one sequence of 512."""
    frozen, count, adapters, activations = QLORA[name]
    model = ref.models.named(name)
    assert sum(map(math.prod, ref.memory.adapters(model, 64))) == count
    opt = ref.Optimizer("adamw", {"p": "bf16"})
    need = ref.memory.train(model, opt, lora=64, base="double", batch=1, sequence=512, checkpoint=True)
    assert need.frozen / 1e9 == pytest.approx(frozen, abs=6e-4)
    assert (need.weights + need.gradients + need.states) / 1e9 == pytest.approx(adapters, abs=6e-4)
    assert need.activations / 1e9 == pytest.approx(activations, abs=6e-3)


@pytest.mark.parametrize(
    ("sequence", "flash", "checkpoint", "gigabytes"),
    [(2048, True, False, 10.7), (2048, False, False, 36.5), (2048, True, True, 1.5)]
    + [(4096, True, False, 21.4), (4096, False, False, 124.5), (4096, True, True, 3.0)],
)
def test_activations_of_seven_billion(
    ref: ModuleType, sequence: int, flash: Any, checkpoint: Any, gigabytes: float
) -> None:
    need = ref.memory.activations(ref.models.named("llama-2-7b"), 1, sequence, checkpoint, flash)
    assert round(need / 1e9, 1) == gigabytes


def test_states_elsewhere_are_not_on_the_device(ref: ModuleType) -> None:
    shapes = [(4096, 512)]
    one = ref.memory.train(shapes, ref.Optimizer("adamw"))
    for place, host, disk in (("host", one.states, 0), ("paged", one.states, 0)):
        need = ref.memory.train(shapes, ref.Optimizer("adamw", place=place))
        assert (need.host, need.disk) == (host, disk)
        assert need.total <= one.total
    pages = ref.Optimizer("adamw", place=ref.places.paged(page_blocks=16))
    assert ref.memory.train(shapes, pages).states == 2 * 16 * 256 * 8
    on_disk = ref.Optimizer("adamw", place=ref.places.disk(path="nowhere", page_blocks=16))
    need = ref.memory.train(shapes, on_disk)
    assert (need.states, need.host, need.disk) == (0, 2 * 16 * 256 * 8, 2 * one.states)
    for place in ("host", "paged"):
        opt = ref.Optimizer("adamw", place=place)
        peak, need = opt.peak([np.zeros(shapes[0], f32)]), ref.memory.train(shapes, opt, gradient_bytes=4)
        assert peak.device == need.total


CONFIG = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 14336, "vocab_size": 128256, "num_key_value_heads": 8,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "intermediate_size": 4864, "vocab_size": 151936, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def test_a_config_gives_the_model_that_it_describes(ref: ModuleType, tmp_path: Any) -> None:
    import json

    (tmp_path / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    for source in (CONFIG, tmp_path, str(tmp_path / "config.json")):
        assert ref.models.from_config(source).shapes == ref.models.named("llama-3-8b").shapes
    assert ref.models.from_config({"model_type": "gpt2"}).size == PUBLISHED["gpt2"]
    assert ref.models.from_config(QWEN).size == 494_032_768
    three = QWEN | {"model_type": "qwen3", "hidden_size": 1024, "num_hidden_layers": 28, "num_attention_heads": 16}
    three |= {"intermediate_size": 3072, "num_key_value_heads": 8, "head_dim": 128}
    assert ref.models.from_config(three).size == 596_049_920


WRONG = {
    "no model": (lambda ref, opt: ref.models.named("llama-2-7"), r"models.named: no model 'llama-2-7'.*llama-2-7b"),
    "a family": (lambda ref, opt: ref.models.from_config({"model_type": "mamba"}), r"model_type must be .*'mamba'"),
    "a size": (lambda ref, opt: ref.models.from_config(CONFIG | {"vocab_size": 0}), r"vocab_size must be .*, got 0"),
    "no size": (lambda ref, opt: ref.models.from_config({"model_type": "llama"}), r"hidden_size must be .*None"),
    "ranks": (lambda ref, opt: ref.memory.train([(2,)], opt, ranks=0), r"memory.train: ranks must be .*, got 0"),
    "stage": (lambda ref, opt: ref.memory.train([(2,)], opt, stage=0), r"memory.train: stage must be .*, got 0"),
    "rank": (lambda ref, opt: ref.memory.train(ref.models.named("gpt2"), opt, lora=769), r"lora must be <= 768.* 769"),
    "base": (lambda ref, opt: ref.memory.train(ref.models.named("gpt2"), opt, lora=2, base="nf"), r"no codec 'nf'"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bad_input_is_one_sentence(ref: ModuleType, what: str) -> None:
    run, says = WRONG[what]
    with pytest.raises(ValueError, match=says):
        run(ref, ref.Optimizer("adamw"))


def test_shapes_alone_have_no_adapters_and_no_tokens(ref: ModuleType) -> None:
    for more in ({"lora": 8}, {"batch": 2}):
        with pytest.raises(TypeError, match="need a Model"):
            ref.memory.train([(2, 3)], ref.Optimizer("adamw"), **more)
