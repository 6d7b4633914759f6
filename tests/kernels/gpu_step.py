"""One launch beside the oracle: the same tensors stepped by a raw kernel and by `refopt.Optimizer`, word for word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from refopt import Optimizer
from refopt.spec import Box
from refopt_cuda.kernels.step_cuda import SKIP, Launch, Tensor
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


@dataclass
class Pair:
    """Tensors on the device and the same ones in NumPy."""

    rule: str
    codecs: tuple[str, ...]
    param: str
    grad: str
    hyper: dict[str, Any]
    block: int = 256

    def __post_init__(self) -> None:
        probe = Optimizer(self.rule, **self.hyper)
        self.names = [s.name for s in probe.states]
        assigned = {n: self._codec(c) for n, c in zip(self.names, self.codecs, strict=True)}
        self.opt = Optimizer(self.rule, assigned, **self.hyper)
        self.launch = Launch(
            form_of(self.rule, self.opt.hyper), self.codecs[: len(self.names)], self.param, self.grad, self.block
        )

    def _codec(self, stem: str) -> Any:
        from refopt.codecs import CODECS

        return CODECS[stem](block=self.block) if CODECS[stem].scope == "block" else stem

    def start(self, params: list[np.ndarray]) -> None:
        import cupy

        self.words = [narrow(p, self.param) for p in params]
        self.state = self.opt.init([widen(w, self.param) for w in self.words])
        self.p = [cupy.asarray(w) for w in self.words]
        self.s = [[_device(s[n]) for n in self.names] for s in self.state]
        pointers = [
            Tensor(p.data.ptr, tuple((c.data.ptr, z.data.ptr if z is not None else 0) for c, z in s), w.shape)
            for p, s, w in zip(self.p, self.s, self.words, strict=True)
        ]
        self.launch.bind(pointers)

    def step(self, grads: list[np.ndarray | None], shift: int = 0) -> None:
        """Both sides, then the comparison; `shift` moves the gradients off their alignment, in bytes."""
        import cupy

        words = [None if g is None else narrow(g, self.grad) for g in grads]
        device = [None if w is None else _shifted(w, shift) for w in words]
        ts = [s["t"] + 1 for s in self.state]
        rows = sorted(set(ts))
        scalars = np.stack([row(self.rule, t, self.opt.hyper) for t in rows])
        pointers = [SKIP if d is None else d.data.ptr + shift for d in device]
        self.launch.run(pointers, scalars, [rows.index(t) for t in ts], cupy.cuda.get_current_stream().ptr)
        self.expect(words)
        self.compare()

    def expect(self, words: list[np.ndarray | None]) -> None:
        params = [widen(w, self.param) for w in self.words]
        grads = [None if w is None else widen(w, self.grad) for w in words]
        params, self.state = self.opt.step(params, grads, self.state)
        self.words = [narrow(p, self.param) for p in params]

    def compare(self) -> None:
        for k, (w, p, s) in enumerate(zip(self.words, self.p, self.state, strict=True)):
            _agree(f"p of tensor {k} {w.shape}", w, p.get(), self.param)
            for n, (codes, scales) in zip(self.names, self.s[k], strict=True):
                have = s[n]
                want = have.codes if isinstance(have, Box) else have.view(np.uint32)
                got = codes.get()
                if isinstance(have, Box) and have.codec.scope == "element":
                    _agree(f"{n} of tensor {k} {w.shape}", want, got, "bfloat16")
                elif isinstance(have, Box):
                    assert (want.view(np.uint8) == got.view(np.uint8)).all(), f"{n} codes of tensor {k} {w.shape}"
                    _agree(
                        f"{n} scales of tensor {k} {w.shape}", have.scales.view(np.uint32), scales.get().view(np.uint32)
                    )
                else:
                    _agree(f"{n} of tensor {k} {w.shape}", want, got.view(np.uint32))


def _device(stored: Any) -> tuple[Any, Any]:
    import cupy

    if not isinstance(stored, Box):
        return cupy.asarray(stored), None
    return cupy.asarray(stored.codes), cupy.asarray(stored.scales) if stored.codec.scope == "block" else None


def _shifted(words: np.ndarray, shift: int) -> Any:
    import cupy

    raw = cupy.zeros(words.nbytes + shift, cupy.uint8)
    raw[shift:] = cupy.asarray(np.ascontiguousarray(words).reshape(-1).view(np.uint8))
    return raw


def _agree(what: str, want: np.ndarray, got: np.ndarray, number: str = "float32") -> None:
    bad = ~same(want, got, number)
    if bad.any():
        at = np.argwhere(bad)[0]
        raise AssertionError(f"{what}: {bad.sum()} of {bad.size} words differ, first at {at.tolist()}")
