"""One optimizer step on one GPU: time against the device's own copy, peers in the same process, bits against NumPy.

    python -m tests.bench.gpu_step [--commit HASH] [--quick]

of_copy = (p + g + states read, p + states written) / time / copy bandwidth (bytes read + written by a device copy).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch

import refopt
from refopt_cuda.kernels.step_cuda import Launch, Tensor
from refopt_cuda.rules import RULES, named
from tests.bench.clocks import copy_bandwidth, device_ms, tidy
from tests.bench.models import FLAT
from tests.bench.record import Recorder, arguments, software

HYPER = {"adamw": {"lr": 1e-3, "wd": 0.01}, "lion": {"lr": 1e-4, "wd": 0.1}, "sgd": {"lr": 1e-2, "momentum": 0.9}}
WIDTH = {"f32": 4.0, "dynamic8": 1 + 4 / 256, "int8_linear": 1 + 4 / 256}
NUMBERS = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}


class Flat:
    """One flat tensor under a raw launch."""

    def __init__(self, rule: str, codecs: tuple[str, ...], dtype: torch.dtype, n: int) -> None:
        self.rule, self.codecs, self.n = rule, codecs, n
        self.p = torch.randn(n, device="cuda").to(dtype)
        self.g = (torch.randn(n, device="cuda") * 1e-3).to(dtype)
        form = named(rule, len(codecs))
        assert form is not None
        self.states = [self._zero(c, not never) for c, (_, never) in zip(codecs, form.states, strict=True)]
        self.launch = Launch(form, codecs, NUMBERS[dtype], NUMBERS[dtype])
        pointers = tuple((c.data_ptr(), z.data_ptr() if z is not None else 0) for c, z in self.states)
        self.launch.bind([Tensor(self.p.data_ptr(), pointers, (n,))])
        self.t = 0

    def _zero(self, codec: str, signed: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        if codec == "f32":
            return torch.zeros(self.n, device="cuda"), None
        zero = 127 if codec == "dynamic8" and signed else 0
        codes = torch.full((self.n,), zero, dtype=torch.uint8, device="cuda")
        return codes, torch.zeros(-(-self.n // 256), device="cuda")

    def step(self) -> None:
        self.t += 1
        row = RULES[self.rule].scalars(self.t, **HYPER[self.rule])[None]
        self.launch.run([self.g.data_ptr()], row, None, torch.cuda.current_stream().cuda_stream)

    def moved(self) -> float:
        """Bytes a step must move."""
        return self.n * (2 * self.p.element_size() + self.g.element_size() + 2 * sum(WIDTH[c] for c in self.codecs))


def gradient(n: int, seed: int) -> torch.Tensor:
    """Magnitudes log-uniform from 1e-12 to 1e6, both signs."""
    made = torch.Generator(device="cuda").manual_seed(seed)
    size = torch.empty(n, device="cuda").uniform_(-12, 6, generator=made)
    return torch.pow(10.0, size).mul_(torch.empty(n, device="cuda").normal_(generator=made))


def bf16_words(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).cpu().numpy().view(np.uint16)


def widen(words: np.ndarray) -> np.ndarray:
    return (words.astype(np.uint32) << 16).view(np.float32)


def mismatches(n: int, steps: int = 3, parts: int = 64) -> dict[str, int]:
    """8-bit AdamW in bf16 on the GPU and in NumPy, part by part: how many words of p, codes and scales differ."""
    flat = Flat("adamw", ("dynamic8", "dynamic8"), torch.bfloat16, n)
    opt = refopt.Optimizer("adamw", "dynamic8", **HYPER["adamw"])
    cuts = [slice(k * (n // parts), (k + 1) * (n // parts)) for k in range(parts)]
    words = bf16_words(flat.p)
    sides = [[words[c], opt.init(widen(words[c]))] for c in cuts]
    wrong = {"p": 0, "codes": 0, "scales": 0}
    for k in range(steps):
        flat.g = gradient(n, 100 + k).to(torch.bfloat16)
        flat.step()
        g, p = bf16_words(flat.g), bf16_words(flat.p)
        stored = [(c.cpu().numpy(), s.cpu().numpy()) for c, s in flat.states if s is not None]

        def part(
            side: list[Any], cut: slice, g: np.ndarray = g, p: np.ndarray = p, stored: Any = stored
        ) -> tuple[int, int, int]:
            new, side[1] = opt.step(widen(side[0]), widen(g[cut]), side[1])
            side[0] = refopt.codecs.bf16.encode(new).codes
            scale = slice(cut.start // 256, cut.stop // 256)
            boxes = [side[1][0][n] for n in ("m", "v")]
            codes = sum(int((b.codes != c[cut]).sum()) for b, (c, _) in zip(boxes, stored, strict=True))
            scales = sum(
                int((b.scales.view(np.uint32) != s[scale].view(np.uint32)).sum())
                for b, (_, s) in zip(boxes, stored, strict=True)
            )
            return int((side[0] != p[cut]).sum()), codes, scales

        with ThreadPoolExecutor(16) as pool:
            for counts in pool.map(part, sides, cuts):
                for name, count in zip(wrong, counts, strict=True):
                    wrong[name] += count
    return wrong


SUBJECTS: Sequence[tuple[str, str, tuple[str, ...], torch.dtype]] = (
    ("AdamW8bit", "adamw", ("dynamic8", "dynamic8"), torch.bfloat16),
    ("AdamW", "adamw", ("f32", "f32"), torch.bfloat16),
    ("Lion8bit", "lion", ("dynamic8",), torch.bfloat16),
    ("SGD8bit", "sgd", ("dynamic8",), torch.bfloat16),
    ("AdamW8bit f32 weights", "adamw", ("dynamic8", "dynamic8"), torch.float32),
    ("AdamW int8_linear", "adamw", ("int8_linear", "int8_linear"), torch.bfloat16),
)


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    versions = software("torch", "cupy-cuda13x", "numpy")
    rec = Recorder("gpu_step", torch.cuda.get_device_name(), versions, args.commit, args.out)
    if not args.dry:
        rec.check()
    copy = copy_bandwidth("cuda")
    rec.add("flat268m", "device copy", "bandwidth", copy / 1e9, "GB/s")
    for subject in SUBJECTS:
        if not args.only or subject[0] in args.only:
            guarded(subject[0], partial(time_of, rec, copy, *subject))
    guarded("torch AdamW fused", partial(fused, rec))
    if not args.quick:
        guarded("AdamW8bit beside NumPy", partial(beside_numpy, rec))
    if not args.dry:
        rec.save()


def guarded(name: str, measure: Callable[[], None]) -> None:
    """What goes wrong is printed."""
    try:
        measure()
    except Exception as error:
        print(f"flat268m         {name:<34} FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
    tidy("cuda")


def time_of(rec: Recorder, copy: float, subject: str, rule: str, codecs: tuple[str, ...], dtype: torch.dtype) -> None:
    flat = Flat(rule, codecs, dtype, FLAT)
    ms = device_ms(flat.step, "cuda")
    rec.add("flat268m", subject, "ms", ms, "ms")
    reached = flat.moved() / (ms * 1e-3)
    rec.add("flat268m", subject, "of_copy", reached / 1e9, "GB/s", "device copy", reached / copy)


def fused(rec: Recorder) -> None:
    p = torch.nn.Parameter(torch.randn(FLAT, device="cuda").to(torch.bfloat16))
    p.grad = (torch.randn(FLAT, device="cuda") * 1e-3).to(torch.bfloat16)
    opt = torch.optim.AdamW([p], fused=True)
    rec.add("flat268m", "torch AdamW fused", "ms", device_ms(opt.step, "cuda"), "ms")


def beside_numpy(rec: Recorder) -> None:
    for name, count in mismatches(FLAT).items():
        rec.add("flat268m", "AdamW8bit", f"mismatches_{name}", count, "words", "NumPy, 3 steps")


if __name__ == "__main__":
    main()
