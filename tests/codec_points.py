"""What block codecs are compared at: every form that the fast path has, and inputs where a code or a scale changes.

Nothing here knows a codec's arithmetic: where codes change is found by bisection over the words of float32.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from refopt import codecs as oracle
from refopt.spec import Box
from refopt_cuda.codecs import compand8, fp4, fp8, nf4, q4
from refopt_cuda.codecs.forms import TINY

f32: Any = np.float32
Array = np.ndarray
MODULES: dict[str, ModuleType] = {"fp8": fp8, "q4": q4, "compand8": compand8, "nf4": nf4, "fp4": fp4}
BLOCK = 64
"""A size that every codec has."""
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1.1754942e-38, -1.1754944e-38, 2.0**-100, 1.0, 3.4028235e38, -3.4028235e38]


class CodecForm(NamedTuple):
    """A codec with each of its options chosen."""

    stem: str
    options: dict[str, Any]

    @property
    def name(self) -> str:
        signs = {True: "signed", False: "unsigned"}
        return "_".join([self.stem, *(signs.get(v, v) for v in self.options.values())])

    @property
    def module(self) -> ModuleType:
        return MODULES[self.stem]

    @property
    def signed(self) -> bool:
        """Whether it takes negative numbers."""
        return bool(self.options.get("signed", True))

    @property
    def per_byte(self) -> int:
        return 8 // self.module.BITS

    def record(self, block: int = BLOCK) -> Any:
        return oracle.CODECS[self.stem](block=block, layout="flat", **self.options)

    def box(self, codes: Array, scales: Array) -> Box:
        """Bytes and the float32 or uint16 words of scales, one a block of 64, as the oracle stores them."""
        dtype, scale_dtype = self.module.dtype(**self.options), self.module.scale_dtype(**self.options)
        arrays = {"codes": codes.view(dtype), "scales": scales.view(scale_dtype)}
        return Box(self.record(), (codes.size * self.per_byte,), arrays)


FORMS = [
    CodecForm(stem, dict(zip(module.OPTIONS, chosen, strict=True)))
    for stem, module in MODULES.items()
    for chosen in product(*module.OPTIONS.values())
]


def nibbles(packed: Array) -> Array:
    """The 4-bit codes of bytes, the high half first."""
    return np.stack([packed >> 4, packed & 15], -1).reshape(*packed.shape[:-1], -1)


def packed(codes: Array) -> Array:
    """The bytes of 4-bit codes, an even number a row."""
    return codes[..., 0::2] << 4 | codes[..., 1::2]


def below_one(y: Array) -> Array:
    """Blocks of 64 that hold all of y behind a 1; the last is filled up with ones."""
    rows = np.ones((-(-y.size // (BLOCK - 1)), BLOCK), f32)
    rows[:, 1:] = np.append(y, np.ones(-y.size % (BLOCK - 1), f32)).reshape(-1, BLOCK - 1)
    return rows


def codes_of(form: CodecForm, y: Array) -> Array:
    """The oracle's code of each fraction of the largest, one a byte."""
    codes = form.record().encode(below_one(y).reshape(-1)).codes.view(np.uint8)
    codes = nibbles(codes) if form.per_byte == 2 else codes
    return codes.reshape(-1, BLOCK)[:, 1:].reshape(-1)[: y.size]


@cache
def boundaries(form_name: str) -> Array:
    """Words of the first magnitude of each new code, as far as 1, on either side of zero; uint32."""
    form = next(f for f in FORMS if f.name == form_name)
    found = []
    for sign in (0, 0x80000000) if form.signed else (0,):

        def at(words: Array, sign: int = sign) -> Array:
            return codes_of(form, (words | sign).astype(np.uint32).view(f32))

        grid = np.append(np.arange(0, 0x3F80 << 16, 1 << 16), 0x3F800000).astype(np.int64)
        codes = at(grid)
        change = np.flatnonzero(codes[1:] != codes[:-1])
        low, high, old = grid[change], grid[change + 1], codes[change]
        while (high - low > 1).any():
            middle = (low + high) // 2
            same = at(middle) == old
            low, high = np.where(same, middle, low), np.where(same, high, middle)
        found.append(high | sign)
    return np.concatenate(found).astype(np.uint32)


def fractions(form: CodecForm, ulps: int = 3) -> Array:
    """Points of [-1, 1] or [0, 1]: five words for each of the upper halves, both sides of each boundary."""
    tops = np.arange(0x3F80, dtype=np.uint32) << 16
    spread = (tops[:, None] | np.uint32([0, 1, 0x7FFF, 0x8000, 0xFFFF])).reshape(-1)
    if form.signed:
        spread = np.concatenate([spread, spread | np.uint32(0x80000000)])
    near = boundaries(form.name).astype(np.int64)[:, None] + np.arange(-ulps, ulps + 1)
    y = np.concatenate([spread, near.reshape(-1).astype(np.uint32)]).view(f32)
    return y[np.abs(y) <= 1]


def blocks_of_fractions(form: CodecForm) -> Array:
    """The same points in blocks whose largest element is 1."""
    return below_one(fractions(form))


def magnitudes() -> Array:
    """Largest magnitudes of blocks, uint32 words: every exponent with some mantissas; the edges of 2^-100 and of
    float16 (its least number, its largest, the halves below and above), and their squares."""
    mantissas = np.uint32([0, 1, 2, 0x1000, 0x3FFFFF, 0x400000, 0x555555, 0x7FFFFE, 0x7FFFFF])
    every = (np.arange(255, dtype=np.uint32)[:, None] << 23 | mantissas).reshape(-1)
    edges = f32([2.0**-100, 2.0**-25, 1.5 * 2.0**-24, 2.0**-24, 2.0**-14, 65504.0, 65520.0, 65536.0, 2.0**126])
    points = np.concatenate([edges, edges[1:-1] ** 2]).view(np.uint32).astype(np.int64)
    near = (points[:, None] + np.arange(-2, 3)).astype(np.uint32).reshape(-1)
    return np.concatenate([every, near, np.uint32([0x7F800000, 0x7F800001, 0x7FC00000])])


def blocks_of_magnitudes(form: CodecForm) -> Array:
    """One block for each largest magnitude, its other elements random parts of it."""
    rng = np.random.default_rng(3)
    a = magnitudes().view(f32)
    with np.errstate(all="ignore"):
        rows = a[:, None] * (rng.choice([-1.0, 1.0], (a.size, BLOCK)) * 10.0 ** rng.uniform(-6, 0, (a.size, BLOCK)))
        rows = rows.astype(f32)
    rows[:, 5] = np.where(rng.random(a.size) < 0.5, a, -a)
    return rows if form.signed else np.abs(rows)


def random_blocks(seed: int, low: float, high: float, special: float, count: int = 8) -> Array:
    """Log-uniform sizes, either sign, some of them special words; what has no sign takes a negative number for 0."""
    rng = np.random.default_rng(seed)
    shape = (count, BLOCK)
    x = (rng.choice([-1.0, 1.0, 1.0], shape) * 10.0 ** rng.uniform(low, high, shape)).astype(f32)
    return np.where(rng.random(shape) < special, rng.choice(f32(SPECIAL), shape), x)


def live(rows: Array) -> tuple[Array, Array]:
    """(words of the largest magnitude of each row, whether it is coded at all)."""
    a = (rows.view(np.uint32) & np.uint32(0x7FFFFFFF)).max(axis=1)
    return a, (a >= TINY) & (a < 0x7F800000)
