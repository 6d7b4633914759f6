"""One bound `Whole` beside the oracle: the same tensors stepped by both, word for word, on any device."""

from __future__ import annotations

from typing import Any

import numpy as np

from refopt import Optimizer
from refopt_cuda.kernels import rows_cuda
from refopt_cuda.kernels.whole_cuda import ROWS, SKIP, Tensor, Whole
from refopt_cuda.kernels.whole_rules import form_of, rows
from tests.kernels.gpu_step import narrow, same, widen


class Host:
    """Arrays of an emulated device: NumPy's own, which begin at multiples of 16 bytes."""

    @staticmethod
    def put(a: np.ndarray, shift: int = 0) -> np.ndarray:
        room = np.zeros(a.nbytes + shift + 32, np.uint8)
        at = -room.ctypes.data % 16 + shift
        out = room[at : at + a.nbytes].view(a.dtype) if shift % a.dtype.itemsize == 0 else room[at : at + a.nbytes]
        out[:] = np.ascontiguousarray(a).reshape(-1).view(out.dtype)
        return out

    address = staticmethod(lambda a: a.ctypes.data)
    get = staticmethod(lambda a: a)
    stream = staticmethod(lambda: 0)


class Device:
    """CuPy's arrays."""

    @staticmethod
    def put(a: np.ndarray, shift: int = 0) -> Any:
        import cupy

        if a.size == 0:
            return cupy.zeros(0, a.dtype)
        raw = cupy.zeros(a.nbytes + shift, cupy.uint8)
        raw[shift:] = cupy.asarray(np.ascontiguousarray(a).reshape(-1).view(np.uint8))
        return raw[shift:].view(a.dtype) if shift % a.dtype.itemsize == 0 else raw[shift:]

    address = staticmethod(lambda a: a.data.ptr)
    get = staticmethod(lambda a: a.get())

    @staticmethod
    def stream() -> int:
        import cupy

        return cupy.cuda.get_current_stream().ptr


class WholePair:
    """Tensors on a device and the same ones in NumPy."""

    def __init__(
        self, rule: str, hyper: dict[str, Any], weight: str, grad: str, arrays: Any = Device, device: Any = None
    ) -> None:
        self.rule, self.weight, self.grad, self.arrays = rule, weight, grad, arrays
        self.opt = Optimizer(rule, **hyper)
        self.whole = Whole(form_of(rule, self.opt.hyper), self.opt.hyper, weight, grad, device)

    def start(self, params: list[np.ndarray]) -> None:
        self.words = [narrow(p, self.weight) for p in params]
        self.state = self.opt.init([widen(w, self.weight) for w in self.words])
        self.p = [self.arrays.put(w) for w in self.words]
        self.s = [{n: self.arrays.put(np.asarray(x, np.float32)) for n, x in s.items() if n != "t"} for s in self.state]
        address = self.arrays.address
        self.whole.bind(
            [
                Tensor(address(p), {n: address(x) for n, x in s.items()}, w.shape)
                for p, s, w in zip(self.p, self.s, self.words, strict=True)
            ]
        )

    def step(self, grads: list[np.ndarray | None], shift: int = 0) -> None:
        """Both sides, then the comparison; `shift` moves the gradients off their alignment, in bytes."""
        words = [None if g is None else narrow(g, self.grad) for g in grads]
        device = [None if w is None else self.arrays.put(w, shift) for w in words]
        kinds = [(s["t"] + 1, w.ndim < 2) for s, w in zip(self.state, self.words, strict=True)]
        known = sorted(set(kinds))
        made = [rows(self.rule, t, vector, self.opt.hyper) for t, vector in known]
        pointers = [SKIP if d is None else self.arrays.address(d) for d in device]
        self.whole.run(pointers, made, [known.index(kind) for kind in kinds], self.arrays.stream())
        self.expect(words)
        self.compare()

    def step_live(self, grads: list[np.ndarray], skip: bool) -> None:
        """The same with rows in memory, as rows.cu leaves them, of tensors that have been stepped together."""
        words, (t,) = [narrow(g, self.grad) for g in grads], {s["t"] + 1 for s in self.state}
        room = np.zeros((ROWS, rows_cuda.PAIR // 2), np.uint8)
        for vector in (0, 1):
            made = rows(self.rule, t, bool(vector), self.opt.hyper)
            room[vector, : made.scalars.nbytes] = made.scalars.view(np.uint8)
            room[vector, 64 : 64 + made.wide.nbytes] = made.wide.view(np.uint8)
        room[:, 128] = skip
        device, here = [self.arrays.put(w) for w in words], self.arrays.put(room)
        which = [int(w.ndim < 2) for w in self.words]
        addresses = [self.arrays.address(d) for d in device]
        self.whole.run_live(addresses, self.arrays.address(here), which, self.arrays.stream())
        if not skip:
            self.expect(words)
        self.compare()

    def expect(self, words: list[np.ndarray | None]) -> None:
        """The oracle's step with gradients in words."""
        params = [widen(w, self.weight) for w in self.words]
        with np.errstate(all="ignore"):
            given = [None if w is None else widen(w, self.grad) for w in words]
            params, self.state = self.opt.step(params, given, self.state)
            self.words = [narrow(p, self.weight) for p in params]

    def compare(self) -> None:
        for k, (w, p, s) in enumerate(zip(self.words, self.p, self.state, strict=True)):
            for n, x in self.s[k].items():
                want = np.ascontiguousarray(s[n]).reshape(-1)
                agree(
                    f"{n} of tensor {k} {w.shape}", want.view(np.uint32), self.arrays.get(x).view(np.uint32), "float32"
                )
            agree(f"p of tensor {k} {w.shape}", w.reshape(-1), self.arrays.get(p), self.weight)


def agree(what: str, want: np.ndarray, got: np.ndarray, number: str) -> None:
    bad = ~same(want, got, number)
    assert not bad.any(), f"{what}: {bad.sum()} of {bad.size} words differ, first at {np.argwhere(bad)[0].tolist()}"
