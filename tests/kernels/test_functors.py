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
from refopt_cuda.rules import RULES
from tests.bits import same_bits
from tests.kernels.functors import SOURCE, Functors, compiled

pytestmark = pytest.mark.gxx

f32: Any = np.float32
Array = np.ndarray
BLOCK_CODECS = [(stem, signed) for stem in ("dynamic8", "int8_linear") for signed in (True, False)]
ADAM = {"lr": 0.013, "beta1": 0.8, "beta2": 0.97}
CASES: list[tuple[str, dict[str, Any]]] = [
    # functor, hyper-parameters
    ("sgd_plain", {"lr": 0.03, "wd": 0.07}),
    ("sgd_plain", {"lr": 0.03}),
    ("sgd", {"lr": 0.03, "momentum": 0.85, "dampening": 0.2, "wd": 0.07}),
    ("sgd", {"lr": 0.03, "momentum": 0.85, "nesterov": True}),
    ("adam", ADAM | {"eps": 1e-7, "wd": 0.06}),
    ("adam", ADAM | {"eps": 0.0}),
    ("adamw", ADAM | {"eps": 1e-7, "wd": 0.11}),
    ("adamw", ADAM | {"eps": 1e-40, "wd": 0.11}),
    ("lion", {"lr": 0.003, "beta1": 0.85, "beta2": 0.95, "wd": 0.2}),
]
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
    """Four arrays of any float32 words: exponents in one drawn window, some special values in each."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    low = draw(st.integers(0, 255))
    high = draw(st.integers(low, 255))
    out = []
    for _ in range(4):
        words = rng.integers(0, 2, n) << 31 | rng.integers(low, high + 1, n) << 23 | rng.integers(0, 2**23, n)
        x = words.astype(np.uint32).view(f32)
        some = rng.random(n) < draw(st.sampled_from([0.0, 0.1, 0.5]))
        out.append(np.where(some, rng.choice(f32(SPECIAL), n), x))
    return out


@pytest.mark.parametrize(("functor", "hyper"), CASES, ids=str)
@given(drawn=arrays(503), t=st.sampled_from([1, 2, 3, 700, 10**6]), gscale=st.sampled_from([1.0, 0.37, -1.0]))
def test_a_rule_gives_the_oracles_words_over_all_of_float32(functors, functor, hyper, drawn, t, gscale):
    record = oracle_rules.RULES[build.RULES[functor][0]]
    p, g, *states = drawn
    names = [s.name for s in record.states][: build.RULES[functor][1]]
    states = [np.abs(x) if s.nonnegative else x for s, x in zip(record.states, states, strict=False)][: len(names)]
    row = RULES[record.stem].scalars(t, gscale=abs(gscale), maximize=gscale < 0, **hyper)
    with np.errstate(all="ignore"):
        want, after = record.update(p, g * f32(gscale), dict(zip(names, states, strict=True)), t=t, **hyper)
    got, mine = functors.step(functor, p, g, states, row)
    same_bits(got, want, f"{functor} {hyper} t={t}: p")
    for name, x in zip(names, mine, strict=True):
        same_bits(x, after[name], f"{functor} {hyper} t={t}: {name}")


@pytest.mark.parametrize("functor", build.RULES)
def test_the_scalars_of_a_functor_are_those_of_its_python_form(functor):
    stem, states = build.RULES[functor]
    text = (build.ROOT / f"rules/{stem}.cuh").read_text(encoding="utf-8")
    (fields,) = re.findall(r"struct Scalars \{ float ([^;]*); \}", text)
    short = {"momentum": "mu"}
    assert tuple(fields.split(", ")) == tuple(short.get(name, name) for name in RULES[stem].SCALARS)
    assert states == (0 if functor == "sgd_plain" else len(RULES[stem].STATES))


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
