"""4-bit weights on one GPU: how fast they are decoded, what a Linear4bit costs, and the peak of QLoRA.

    python -m tests.bench.gpu_nf4 [--commit HASH] [--only decode,linear,llama-2-7b,llama-2-13b]

Beside bitsandbytes' kernels and layer in the same process, where it is installed. Weights of the models are random and
made a layer at a time (transformers is needed). Without a GPU the script is tried on small shapes, and nothing is
recorded.
"""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

import refopt
from refopt_cuda import dequantize, nn, optim, quantize
from refopt_cuda.nn import scratch
from refopt_cuda.train.finetune import methods
from tests.bench.clocks import copy_bandwidth, device_ms, tidy
from tests.bench.record import Limit, Recorder, arguments, software

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECODED = ((11008, 4096), (8192, 28672)) if DEVICE == "cuda" else ((64, 128),)
LINEAR = ((4096, 4096), (11008, 4096), (4096, 11008)) if DEVICE == "cuda" else ((64, 128),)
TOKENS = 4096 if DEVICE == "cuda" else 8
WORKING_SET = 600 * 2**20 if DEVICE == "cuda" else 2**16
"""Bytes that calls go through by turns, a dozen times the L2 of an H100."""
CODECS = {"double": "nf4_dequantize", "nf4": "nf4_dequantize, float32 scales", "fp4": "fp4_dequantize"}
MODELS = ("llama-2-7b", "llama-2-13b")
SECONDS = 480
BF16 = torch.bfloat16


def peer() -> Any:
    """bitsandbytes, or None."""
    try:
        import bitsandbytes

        return bitsandbytes
    except ImportError:
        return None


def by_turns(make: Callable[[], Any], each: int) -> Iterator[Any]:
    """As many as fill the working set, one after the other, for ever."""
    return itertools.cycle([make() for _ in range(-(-WORKING_SET // each))])


def decode(rec: Recorder, copy: float) -> None:
    """Bytes of codes and scales read and of bfloat16 written in a second, as a part of what a copy moves."""
    for shape in DECODED:
        w = torch.randn(shape, device=DEVICE, dtype=BF16)
        for codec, name in CODECS.items():
            decode_one(rec, copy, w, codec, name)
            tidy(DEVICE)


def decode_one(rec: Recorder, copy: float, w: torch.Tensor, codec: str, name: str) -> None:
    """Ours, and bitsandbytes' kernel."""
    work, q = "x".join(map(str, w.shape)), quantize(w, codec)
    moved = q.nbytes + 2 * w.numel()
    pool = by_turns(lambda: (_copied(q), torch.empty_like(w)), moved)

    def run() -> None:
        stored, out = next(pool)
        dequantize(stored, out=out)

    ms = device_ms(run, DEVICE, ahead=2)
    rate = moved / ms * 1e-6
    rec.add(work, name, "ms", ms, "ms")
    rec.add(work, name, "of_copy", rate, "GB/s", "device copy", rate * 1e9 / copy)
    if peer() is not None and DEVICE == "cuda":
        del pool
        tidy(DEVICE)
        rec.add(work, name, "ms", ms, "ms", "bitsandbytes", ms / _their_ms(w, codec, moved))


def _copied(q: Any) -> Any:
    return type(q)(q.codec, q.shape, q.dtype, q.block, {k: v.clone() for k, v in q.arrays.items()})


def _their_ms(w: torch.Tensor, codec: str, moved: int) -> float:
    functional, kind = peer().functional, "fp4" if codec == "fp4" else "nf4"

    def made() -> Any:
        coded = functional.quantize_4bit(w, quant_type=kind, blocksize=64, compress_statistics=codec == "double")
        return (*coded, torch.empty_like(w))

    pool = by_turns(made, moved)

    def run() -> None:
        codes, state, out = next(pool)
        functional.dequantize_4bit(codes, state, out=out)

    return device_ms(run, DEVICE, ahead=2)


def linear(rec: Recorder) -> None:
    """Forward and backward at 4096 tokens: ours, bfloat16 with one decode each way, bitsandbytes' layer."""
    for out, into in LINEAR:
        linear_one(rec, out, into)
        tidy(DEVICE)


def linear_one(rec: Recorder, out: int, into: int) -> None:
    """One shape: every time as a part of the plain product plus one decode; ours as a part of bitsandbytes' too."""
    work = f"{out}x{into}"
    plain = torch.nn.Linear(into, out, False, device=DEVICE, dtype=BF16).requires_grad_(False)
    ours = nn.Linear4bit.of(plain)
    x = torch.randn(TOKENS, into, device=DEVICE, dtype=BF16, requires_grad=True)
    dy = torch.randn(TOKENS, out, device=DEVICE, dtype=BF16)
    q, W = ours.quantized, torch.empty(out, into, device=DEVICE, dtype=BF16)
    once = device_ms(lambda: dequantize(q, out=W), DEVICE, ahead=2)
    base = {way: ms + once for way, ms in _passes(plain, x, dy).items()}
    mine, lora = _passes(ours, x, dy), _passes(nn.LoRALinear(ours, min(64, out)), x, dy)
    theirs = _passes(_their_layer(plain), x, dy) if peer() is not None and DEVICE == "cuda" else {}
    for way, ms in mine.items():
        rec.add(work, "linear4bit", way, ms, "ms", "bf16 + dequantize", ms / base[way])
        if theirs:
            rec.add(work, "linear4bit", way, ms, "ms", "bitsandbytes", ms / theirs[way])
        rec.add(work, "LoRALinear, r=64", way, lora[way], "ms", "linear4bit", lora[way] / ms)


def _their_layer(plain: torch.nn.Linear) -> Any:
    bnb = peer()
    into, out = plain.in_features, plain.out_features
    made = bnb.nn.Linear4bit(into, out, bias=False, compute_dtype=BF16, quant_type="nf4", device="meta")
    made.weight = bnb.nn.Params4bit(plain.weight.detach().cpu(), requires_grad=False, quant_type="nf4", module=made)
    return made.to(DEVICE)


def _passes(layer: Any, x: torch.Tensor, dy: torch.Tensor) -> dict[str, float]:
    """Milliseconds forward, and backward to x and what trains."""
    y = layer(x)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def back() -> None:
        torch.autograd.grad(y, wanted, dy, retain_graph=True)

    return {"forward": device_ms(lambda: layer(x), DEVICE, ahead=2), "backward": device_ms(back, DEVICE, ahead=2)}


def model(name: str, layers: int | None = None) -> Any:
    """The shapes of a published model with random weights, prepared a layer at a time, with adapters of rank 64."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from accelerate import init_empty_weights
    from transformers import LlamaConfig, LlamaForCausalLM

    m = refopt.models.named(name)
    small = 1 if DEVICE == "cuda" else 64
    config = LlamaConfig(
        hidden_size=m.hidden // small,
        intermediate_size=m.ffn // small,
        num_hidden_layers=layers or m.layers,
        num_attention_heads=m.heads // (1 if small == 1 else 8),
        vocab_size=m.vocab // small,
    )
    with init_empty_weights(include_buffers=False):
        made = LlamaForCausalLM(config)
    shapes = {n: p.shape for n, p in made.named_parameters()}

    def weights(key: str) -> torch.Tensor | None:
        if key not in shapes:
            return None
        w = torch.empty(shapes[key], device=DEVICE, dtype=BF16)
        return w.normal_(std=0.02) if w.ndim == 2 else w.fill_(1)

    nn.prepare(made, weights=weights, device=DEVICE)
    return nn.adapt(made, r=64 if small == 1 else 8)


def peak(rec: Recorder, name: str) -> None:
    """Three steps on one sequence of 512 tokens with checkpoints and 32-bit AdamW, as QLoRA's paper trains: the peak,
    and what lies in it. `backward`: what the last forward and backward pass added, gradients included."""
    tidy(DEVICE)
    _reset()
    made = model(name)
    built = _held()
    made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    made.train()
    trained = [p for p in made.parameters() if p.requires_grad]
    opt = optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.randint(0, made.config.vocab_size, (1, 512 if DEVICE == "cuda" else 16), device=DEVICE)
    peak = gradients = added = 0
    for _ in range(3):
        lain = _held()
        made(input_ids=ids, labels=ids).loss.backward()
        gradients, added = methods.bytes_of(p.grad for p in trained), _held(peak=True) - lain
        peak = max(peak, lain + added)
        _reset()
        opt.step()
        peak = max(peak, _held(peak=True))
        opt.zero_grad()
        _reset()
    parts = methods.counted(made, opt, gradients) | {"backward": added}
    work = {"llama-2-7b": "qlora7b", "llama-2-13b": "qlora13b"}[name]
    rec.add(work, "QLoRA", "built_bytes", built, "B")
    whole, most = _predicted(name)
    for part, size in parts.items():
        beside = getattr(whole, part, 0)
        rec.add(work, "QLoRA", f"{part}_bytes", size, "B", *(("refopt.memory.train", size / beside) if beside else ()))
    rec.add(work, "QLoRA", "peak_bytes", peak, "B", "refopt.memory.peak", peak / most.total)
    if DEVICE == "cuda":
        rec.add(work, "QLoRA", "reserved_bytes", torch.cuda.max_memory_reserved(), "B")
    del made, opt, trained
    gc.collect()
    scratch.release()
    tidy(DEVICE)


def _predicted(name: str) -> tuple[refopt.memory.Bytes, refopt.memory.Bytes]:
    """Each part at its largest, and the largest moment."""
    setup: dict[str, Any] = {"lora": 64, "base": "double", "batch": 1, "sequence": 512, "checkpoint": True}
    model, opt = refopt.models.named(name), refopt.Optimizer("adamw", {"p": "bf16"})
    return refopt.memory.train(model, opt, **setup), refopt.memory.peak(model, opt, **setup)


def _reset() -> None:
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _held(peak: bool = False) -> int:
    """Bytes of torch's arrays, now or at the most, and of CuPy's pool."""
    if DEVICE != "cuda":
        return 1
    import cupy

    ours = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    return ours + cupy.get_default_memory_pool().total_bytes()


def main() -> None:
    args = arguments(__doc__ or "").parse_args()
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    packages = ("torch", "cupy-cuda13x", "numpy", "transformers", "bitsandbytes")
    rec = Recorder("gpu_nf4", name, software(*packages), args.commit, args.out)
    args.dry |= DEVICE == "cpu"
    if not args.dry:
        rec.check()
    limit = Limit(SECONDS)
    wanted = args.only or ("decode", "linear", *MODELS)
    if {"decode", "linear"} & {*wanted}:
        copy = copy_bandwidth(DEVICE) if DEVICE == "cuda" else copy_bandwidth(DEVICE, 2**16)
        rec.add("flat268m", "device copy", "bandwidth", copy / 1e9, "GB/s")
    jobs = {"decode": lambda: decode(rec, copy), "linear": lambda: linear(rec)}
    jobs |= {m: (lambda m=m: peak(rec, m)) for m in MODELS}
    for job in wanted:
        if limit.allows(job, 60):
            jobs[job]()
            if not args.dry:
                rec.save()
    limit.say()


if __name__ == "__main__":
    main()
