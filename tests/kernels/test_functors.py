"""The CUDA functors, built for the host by g++, against the oracle: the same words over all of float32."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refopt import codecs as oracle_codecs
from refopt import rules as oracle_rules
from refopt.codecs.dynamic8 import midpoints
from refopt.spec import Box
from refopt_cuda.codecs.forms import TINY
from refopt_cuda.kernels import build
from refopt_cuda.rules import RULES, form_of, forms, hypers, row
from tests.bits import same_bits
from tests.cases import RULES as CASES
from tests.cases import RuleCase
from tests.kernels.functors import SOURCE, Functors, compiled

pytestmark = pytest.mark.gxx

f32: Any = np.float32
Array = np.ndarray
BLOCK_CODECS = [(stem, signed) for stem in ("dynamic8", "int8_linear") for signed in (True, False)]
EDGES = [
    # no decay, no eps, an eps that is subnormal
    RuleCase("sgd-no-decay", "sgd", (), {"lr": 0.03}),
    RuleCase("adam-no-eps", "adam", ("m", "v"), {"lr": 0.013, "beta1": 0.8, "beta2": 0.97, "eps": 0.0}),
    RuleCase(
        "adamw-least-eps", "adamw", ("m", "v"), {"lr": 0.013, "beta1": 0.8, "beta2": 0.97, "eps": 1e-40, "wd": 0.11}
    ),
]
ORACLE = [case for case in CASES if case.stem in RULES]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, 1.1754944e-38, 1.0, 3.4028235e38, np.inf, -np.inf, np.nan, -np.nan]
SCALES = f32([0.0, 2.0**-100, 1e-20, 0.37, 1.0, 3e5, 3.4028235e38, np.nan])


@pytest.fixture(scope="module")
def functors(gxx, tmp_path_factory) -> Functors:
    return Functors(compiled(gxx, SOURCE, tmp_path_factory.mktemp("functors")))


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


@st.composite
def arrays(draw: st.DrawFn, n: int) -> list[Array]:
    """Five arrays of any float32 words: exponents in one drawn window, some special values in each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low = draw(st.integers(0, 255))
    high = draw(st.integers(low, 255))
    out = []
    for _ in range(5):
        words = rng.integers(0, 2, n) << 31 | rng.integers(low, high + 1, n) << 23 | rng.integers(0, 2**23, n)
        x = words.astype(np.uint32).view(f32)
        some = rng.random(n) < draw(st.sampled_from([0.0, 0.1, 0.5]))
        out.append(np.where(some, rng.choice(f32(SPECIAL), n), x))
    return out


@pytest.mark.parametrize("case", ORACLE + EDGES, ids=lambda case: case.label)
@given(drawn=arrays(503), t=st.sampled_from([1, 2, 3, 700, 10**6]), gscale=st.sampled_from([1.0, 0.37, -1.0]))
def test_a_rule_gives_the_oracles_words_over_all_of_float32(functors, case, drawn, t, gscale):
    check(functors, case.stem, case.hyper, drawn, t, gscale)


@pytest.mark.parametrize("form", [form for stem in RULES for form in forms(stem)], ids=lambda form: form.name)
@given(drawn=arrays(503), t=st.sampled_from([1, 2, 3]))
def test_every_form_gives_the_oracles_words(functors, form, drawn, t):
    usual = next(case.hyper for case in reversed(ORACLE) if case.stem == form.stem)  # without ramps of the betas
    chosen = {n: c if isinstance(c, str) else _value(form.stem, n, c) for n, c in form.options.items()}
    check(functors, form.stem, {n: v for n, v in usual.items() if n not in chosen} | chosen, drawn, t, 1.0)


def _value(stem: str, name: str, on: bool) -> Any:
    """A hyper-parameter that is on, or off: a flag itself, or a number."""
    default = next(h.default for h in oracle_rules.RULES[stem].hypers if h.name == name)
    return on if isinstance(default, bool) else 0.85 * on


def check(functors: Functors, stem: str, hyper: dict[str, Any], drawn: list[Array], t: int, gscale: float) -> None:
    record, form = oracle_rules.RULES[stem], form_of(stem, hyper)
    p, g, *rest = drawn
    states = [np.abs(x) if never else x for x, (_, never) in zip(rest, form.states, strict=False)]
    names = [name for name, _ in form.states]
    scalars = row(stem, t, hyper | {"gscale": abs(gscale), "maximize": gscale < 0})
    with np.errstate(all="ignore"):
        want, after = record.update(p, g * f32(gscale), dict(zip(names, states, strict=True)), t=t, **hyper)
    got, mine = functors.step(form, p, g, states, scalars)
    same_bits(got, want, f"{form.name} {hyper} t={t}: p")
    for name, x in zip(names, mine, strict=True):
        same_bits(x, after[name], f"{form.name} {hyper} t={t}: {name}")


@pytest.mark.parametrize("stem", RULES)
def test_the_scalars_of_a_functor_are_those_of_its_python_form(stem):
    text = (build.ROOT / f"rules/{stem}.cuh").read_text(encoding="utf-8")
    (fields,) = re.findall(r"struct Scalars \{ float ([^;]*); \}", text)
    assert tuple(fields.split(", ")) == RULES[stem].SCALARS


@pytest.mark.parametrize("stem", RULES)
def test_forms_know_every_choice_and_state_of_the_oracles_record(stem):
    record = oracle_rules.RULES[stem]
    assert hypers(stem) == {h.name for h in record.hypers}
    for hyper in record.hypers:
        if hyper.choices:
            assert set(getattr(RULES[stem], "OPTIONS", {})[hyper.name]) == set(hyper.choices)
    for form in forms(stem):
        chosen = {n: c if isinstance(c, str) else _value(stem, n, c) for n, c in form.options.items()}
        kept = record.init(np.zeros(1, f32), **chosen)
        assert [s for s, _ in form.states] == list(kept)
        signs = {s.name: s.nonnegative for s in record.states}
        assert all(signs[name] == never for name, never in form.states)


def test_sgn_is_minus_one_zero_or_one_and_zero_for_nan(functors):
    top = np.arange(2**16, dtype=np.uint32) << 16
    x = np.concatenate([top, top | 1, top | 0xFFFF]).view(f32)
    want = np.where(np.isnan(x), f32(0), np.sign(x)) + f32(0)
    same_bits(functors.signs(x), want, "sgn")


def name_of(stem: str, signed: bool) -> str:
    return f"{stem}_{'signed' if signed else 'unsigned'}"


def record_of(stem: str, signed: bool, n: int) -> Any:
    return oracle_codecs.CODECS[stem](block=n, layout="flat", signed=signed)


def around(points: Array, ulps: int) -> Array:
    """Every point and its neighbours up to so many units in the last place away."""
    return (points.view(np.uint32)[:, None] + np.arange(-ulps, ulps + 1)).astype(np.uint32).reshape(-1).view(f32)


def fractions(stem: str, signed: bool) -> Array:
    """Points of [-1, 1]: two words for each of the top halves, and the neighbourhood of all that lies between codes."""
    top = np.arange(0x3F80, dtype=np.uint32) << 16
    if stem == "dynamic8":
        between = midpoints(signed)
    else:
        levels = 127 if signed else 255
        between = np.float32((np.arange(levels) + 0.5) / levels)
    y = np.concatenate([top.view(f32), (top | 0xFFFF).view(f32), around(between, 2), f32([1.0, 1e-45])])
    return np.concatenate([y, -y])


@pytest.mark.parametrize(("stem", "signed"), BLOCK_CODECS)
@pytest.mark.parametrize("lane", range(4))
def test_every_fraction_of_the_largest_gets_the_oracles_code(functors, stem, signed, lane):
    y = np.concatenate([np.zeros(lane, f32), fractions(stem, signed), f32([1.0])])
    want = record_of(stem, signed, y.size).encode(y)
    assert want.scales.size == 1 and functors.scale(name_of(stem, signed), 1.0) == want.scales[0]
    got = functors.encode(name_of(stem, signed), y, f32(1))
    same_bits(got, want.codes.view(np.uint8), f"codes of {stem}")
    assert len(np.unique(got)) == {"dynamic8": 256, "int8_linear": 255 if signed else 256}[stem]


@pytest.mark.parametrize(("stem", "signed"), BLOCK_CODECS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_code_decodes_to_the_oracles_value(functors, stem, signed, scale):
    record = record_of(stem, signed, 1024)
    codes = np.concatenate([np.roll(np.arange(256), k) for k in range(4)]).astype(np.uint8)  # every code in every byte
    stored = codes.view(np.int8) if stem == "int8_linear" and signed else codes
    want = record.decode(Box(record, codes.shape, {"codes": stored, "scales": f32([scale])}))
    same_bits(functors.decode(name_of(stem, signed), codes, scale), want, f"{stem} times {scale}")


@pytest.mark.parametrize(("stem", "signed"), BLOCK_CODECS)
@given(drawn=arrays(256))
def test_a_block_of_any_numbers_gets_the_oracles_codes_and_scale(functors, stem, signed, drawn):
    for x in drawn:
        x = x if signed else np.abs(x)
        with np.errstate(all="ignore"):
            want = record_of(stem, signed, x.size).encode(x)
            absmax = np.abs(x).max()
            live = np.isfinite(absmax) and absmax.view(np.uint32) >= TINY
            inv = f32(1) / absmax
        zero = functors.number(f"{name_of(stem, signed)}_zero")
        codes = functors.encode(name_of(stem, signed), x, inv) if live else np.full(256, zero & 255, np.uint8)
        same_bits(codes, want.codes.view(np.uint8), f"codes of {stem}, absmax {absmax}")
        if live:
            same_bits(functors.scale(name_of(stem, signed), absmax), want.scales[0], f"scale of {stem}")


@pytest.mark.parametrize(("stem", "signed"), BLOCK_CODECS)
def test_a_word_of_zeros_is_what_zeros_encode_to(functors, stem, signed):
    codes = functors.encode(name_of(stem, signed), np.zeros(4, f32), f32(1))
    assert codes.view(np.uint32)[0] == functors.number(f"{name_of(stem, signed)}_zero")


@pytest.mark.parametrize("stem", ["f32", "bf16"])
def test_an_element_codec_gives_the_oracles_words(functors, stem):
    top = np.arange(2**16, dtype=np.uint32) << 16
    low = np.uint32([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (top[:, None] | low).reshape(-1).view(f32)
    record = oracle_codecs.CODECS[stem]
    box = record.encode(x)
    got = functors.store(stem, x)
    same_bits(got, box.codes, f"{stem}, stored")
    same_bits(functors.load(stem, got), record.decode(box), f"{stem}, loaded")
