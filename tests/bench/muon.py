"""Muon over the matrices of Llama-3.2-1B on one GPU, beside torch.optim.Muon; operations, and their least time.

    python -m tests.bench.muon [--commit HASH] [--tune]

--tune also times other numbers of stripes, ways and formats, and records nothing of it. Without a GPU the
script is tried on small matrices on the CPU, and nothing is recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from refopt_cuda.optim import newton_schulz
from refopt_cuda.optim.muon import Muon
from tests.bench.clocks import device_ms
from tests.bench.record import Recorder, arguments, software

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 16
SMALL = 64
"""Matrices are this many times smaller, each side, where the script is only tried."""
LLAMA: Sequence[tuple[str, tuple[int, int], int]] = (
    ("embedding", (128256, 2048), 1),
    ("q, o", (2048, 2048), 2 * LAYERS),
    ("k, v", (512, 2048), 2 * LAYERS),
    ("gate, up", (8192, 2048), 2 * LAYERS),
    ("down", (2048, 8192), LAYERS),
)
"""What, shape, how many: all matrices of Llama-3.2-1B, the embedding included."""
DENSE = 650e12
"""Operations a second that large products of 16-bit numbers reach on an H100."""


def matrices(shapes: Iterable[tuple[tuple[int, int], int]]) -> list[Any]:
    """bfloat16 weights with bfloat16 gradients."""
    out = []
    for shape, count in shapes:
        for _ in range(count):
            p = torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(0.02))
            p.grad = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).mul_(1e-3)
            out.append(p)
    return out


def operations(shape: tuple[int, int], steps: int = 5) -> tuple[float, float]:
    """Floating-point operations of one matrix: ours, symmetric products in stripes, and the plain way."""
    m, n = sorted(shape)
    found = newton_schulz.way(m, n, torch.float16, steps)
    plain = newton_schulz.products(m, n, newton_schulz.Way((1,) * steps, "X"))
    share = (newton_schulz.STRIPES + 1) / (2 * newton_schulz.STRIPES) if m >= newton_schulz.STRIPED else 1.0
    return newton_schulz.products(m, n, found, share), plain


def table() -> str:
    """The operations of every shape, and the milliseconds they take at best."""
    lines = [f"{'what':<10} {'shape':>13} {'count':>5} {'plain TFLOP':>12} {'ours TFLOP':>11} {'ours ms':>8}"]
    total = [0.0, 0.0]
    for what, shape, count in LLAMA:
        ours, plain = (count * x for x in operations(shape))
        total = [total[0] + ours, total[1] + plain]
        size = f"{shape[0]}x{shape[1]}"
        lines.append(
            f"{what:<10} {size:>13} {count:>5} {plain / 1e12:>12.2f} {ours / 1e12:>11.2f} {ours / DENSE * 1e3:>8.1f}"
        )
    ours, plain = total
    lines.append(f"{'all':<30} {plain / 1e12:>12.2f} {ours / 1e12:>11.2f} {ours / DENSE * 1e3:>8.1f}")
    return "\n".join(lines)


def timed(params: list[Any], make: Any) -> tuple[float, float]:
    """Milliseconds a step, and GiB that a step takes for itself and gives back."""
    opt = make(params)
    opt.step()
    if DEVICE == "cpu":
        return device_ms(opt.step, DEVICE, times=1, warm=0), 0.0
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    ms = device_ms(opt.step, DEVICE)
    return ms, (torch.cuda.max_memory_allocated() - held) / 2**30


def tune(params: list[Any]) -> None:
    """Other stripes, ways and formats; without Newton-Schulz steps what is left are the passes."""
    settings: dict[str, Sequence[float]] = {"STRIPES": (1, 2, 3, 4, 6, 8), "ANCHORED": (1.5, 8.0)}
    for name, values in settings.items():
        usual = getattr(newton_schulz, name)
        for value in values:
            setattr(newton_schulz, name, value)
            print(f"{name} = {value}: {timed(params, Muon)[0]:.2f} ms", flush=True)
        setattr(newton_schulz, name, usual)
    for words in ({"ns_dtype": "bfloat16"}, {"momentum_dtype": "bfloat16"}, {"ns_steps": 0}):
        print(f"{words}: {timed(params, partial(Muon, **words))[0]:.2f} ms", flush=True)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tune", action="store_true", help="time other stripes and formats as well")
    args = parser.parse_args()
    print(table(), flush=True)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    rec = Recorder("muon", name, software("torch", "cupy-cuda13x"), args.commit, args.out)
    args.dry |= DEVICE == "cpu"
    if not args.dry:
        rec.check()
    sizes = [(what, shape if DEVICE == "cuda" else small(shape), count) for what, shape, count in LLAMA]
    params = matrices((shape, count) for _, shape, count in sizes)
    ours, room = timed(params, Muon)
    theirs, _ = timed(params, torch.optim.Muon)
    rec.add("llama1b", "torch Muon", "ms", theirs, "ms")
    rec.add("llama1b", "Muon", "ms", ours, "ms", "torch Muon", theirs / ours)
    rec.add("llama1b", "Muon", "room", room, "GiB")
    for what, shape, count in sizes:
        some = [p for p in params if tuple(p.shape) == shape]
        mine, other = timed(some, Muon)[0], timed(some, torch.optim.Muon)[0]
        rec.add(what, f"Muon, {count} matrices", "ms", mine, "ms", "torch Muon", other / mine)
    if args.tune:
        tune(params)
    if not args.dry:
        rec.save()


def small(shape: tuple[int, int]) -> tuple[int, int]:
    return shape[0] // SMALL, shape[1] // SMALL


if __name__ == "__main__":
    main()
