"""One launch beside the oracle: the same tensors stepped by a raw kernel and by `refopt.Optimizer`, word for word."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from refopt import Optimizer
from refopt.codecs import CODECS
from refopt.spec import Box
from refopt_cuda.codecs import named
from refopt_cuda.kernels.step_cuda import SKIP, Launch, Tensor
from refopt_cuda.random import step_word
from refopt_cuda.rules import form_of, row

TO_WORDS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


def widen(words: np.ndarray, number: str) -> np.ndarray:
    """Stored words of a number format as float32, exactly."""
    if number == "float32":
        return words.view(np.float32)
    if number == "float16":
        return words.view(np.float16).astype(np.float32)
    return (words.astype(np.uint32) << 16).view(np.float32)


def narrow(x: np.ndarray, number: str) -> np.ndarray:
    """float32 as words of a number format, rounded to nearest even."""
    if number == "float32":
        return x.view(np.uint32)
    if number == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    from refopt import codecs

    return codecs.bf16.encode(x).codes


def same(a: np.ndarray, b: np.ndarray, number: str = "float32") -> np.ndarray:
    """Where two arrays of words agree, all NaNs being one value."""
    return (a == b) | (np.isnan(widen(a, number)) & np.isnan(widen(b, number)))


def record(name: str, block: int | None = None) -> Any:
    """The oracle's codec for a name of `refopt_cuda.codecs`: "dynamic8", "fp8.e5m2", "bf16_ecc.16"."""
    form = named(name)
    found = CODECS[form.stem]
    options = {option: choice for option, choice in form.options.items() if option != "signed"}
    return found(**options, **({"block": block} if block and found.scope == "block" else {}))


class Device:
    """What runs a launch: a GPU, through CuPy."""

    def upload(self, words: np.ndarray) -> Any:
        import cupy

        return cupy.asarray(words)

    def bind(self, launch: Launch, tensors: Any) -> None:
        launch.bind(tensors)

    def run(self, launch: Launch, grads: list[int], scalars: np.ndarray, which: list[int], random: list[int]) -> None:
        import cupy

        launch.run(grads, scalars, which, cupy.cuda.get_current_stream().ptr, random)


@dataclass
class Pair:
    """Tensors on the device and the same ones in NumPy."""

    rule: str
    codecs: tuple[str, ...]
    weight: str
    grad: str
    hyper: dict[str, Any]
    block: int | tuple[int, ...] = 256
    seed: int = 5
    device: Device = field(default_factory=Device)

    def __post_init__(self) -> None:
        probe = Optimizer(self.rule, **self.hyper)
        form = form_of(self.rule, probe.hyper)
        self.names = [name for name, _ in form.states]
        self.codecs = self.codecs[: len(self.names)]
        blocks = self.block if isinstance(self.block, tuple) else (self.block,) * len(self.names)
        assigned = {n: record(c, b) for n, c, b in zip(self.names, self.codecs, blocks, strict=True)}
        self.visible = self.weight if self.weight in TO_WORDS else "bfloat16"
        if self.weight not in TO_WORDS:
            assigned["p"] = record(self.weight)
        self.opt = Optimizer(self.rule, assigned, seed=self.seed, **self.hyper)
        self.launch = Launch(form, self.codecs, self.weight, self.grad, blocks)

    def start(self, params: list[np.ndarray]) -> None:
        upload = self.device.upload
        self.words = [narrow(p, self.visible) for p in params]
        self.state = self.opt.init([widen(w, self.visible) for w in self.words])
        self.p = [upload(w) for w in self.words]
        self.s = [[[upload(x) for x in _stored(s[n])] for n in self.names] for s in self.state]
        self.rest = [None if (x := _beside(s)) is None else upload(x) for s in self.state]
        pointers = [
            Tensor(p.data.ptr, tuple((c.data.ptr, z[0].data.ptr if z else 0) for c, *z in s), w.shape, *more)
            for p, s, w, more in zip(self.p, self.s, self.words, self._more(), strict=True)
        ]
        self.device.bind(self.launch, pointers)

    def _more(self) -> list[tuple[int, int]]:
        return [(0 if rest is None else rest.data.ptr, k) for k, rest in enumerate(self.rest)]

    def step(self, grads: list[np.ndarray | None], shift: int = 0) -> None:
        """Both sides, then the comparison; `shift` moves the gradients off their alignment, in bytes."""
        words = [None if g is None else narrow(g, self.grad) for g in grads]
        device = [None if w is None else self.device.upload(_shifted(w, shift)) for w in words]
        ts = [s["t"] + 1 for s in self.state]
        rows = sorted(set(ts))
        scalars = np.stack([row(self.rule, t, self.opt.hyper) for t in rows])
        pointers = [SKIP if d is None else d.data.ptr + shift for d in device]
        drawn = [step_word(self.seed, t) for t in rows]
        self.device.run(self.launch, pointers, scalars, [rows.index(t) for t in ts], drawn)
        self.expect(words)
        self.compare()

    def expect(self, words: list[np.ndarray | None]) -> None:
        params = [widen(w, self.visible) for w in self.words]
        grads = [None if w is None else widen(w, self.grad) for w in words]
        params, self.state = self.opt.step(params, grads, self.state)
        self.words = [narrow(p, self.visible) for p in params]

    def compare(self) -> None:
        for k, (w, p, s, rest) in enumerate(zip(self.words, self.p, self.state, self.rest, strict=True)):
            _agree(f"p of tensor {k} {w.shape}", w, p.get(), self.visible)
            if rest is not None:
                number = "bfloat16" if self.weight == "bf16_kahan" else ""
                _agree(f"beside p of tensor {k} {w.shape}", _beside(s), rest.get(), number)
            for n, codec, (codes, *scales) in zip(self.names, self.codecs, self.s[k], strict=True):
                have = s[n]
                arrays = have.arrays if isinstance(have, Box) else {"codes": have}
                number = {"f32": "float32", "bf16": "bfloat16"}.get(codec, "")
                _agree(f"{n} of tensor {k} {w.shape}", _words(arrays["codes"]), _words(codes.get()), number)
                if scales:
                    number = {"float16": "float16", "uint16": "bfloat16"}.get(arrays["scales"].dtype.name, "float32")
                    what = f"{n} scales of tensor {k} {w.shape}"
                    _agree(what, _words(arrays["scales"]), _words(scales[0].get()), number)


def _words(a: np.ndarray) -> np.ndarray:
    return a.view(f"u{a.dtype.itemsize}")


def _beside(state: dict[str, Any]) -> np.ndarray | None:
    return next(iter(state["p"].arrays.values())) if isinstance(state.get("p"), Box) else None


def _stored(stored: Any) -> list[np.ndarray]:
    """Its codes, and its scales if it has any."""
    if not isinstance(stored, Box):
        return [stored]
    return [stored.codes, stored.scales] if stored.codec.scope == "block" else [stored.codes]


def _shifted(words: np.ndarray, shift: int) -> np.ndarray:
    raw = np.zeros(words.nbytes + shift, np.uint8)
    raw[shift:] = np.ascontiguousarray(words).reshape(-1).view(np.uint8)
    return raw


def _agree(what: str, want: np.ndarray, got: np.ndarray, number: str = "") -> None:
    bad = ~same(want, got, number) if number else _words(want) != _words(got)
    if bad.any():
        at = np.argwhere(bad)[0]
        raise AssertionError(f"{what}: {bad.sum()} of {bad.size} words differ, first at {at.tolist()}")
