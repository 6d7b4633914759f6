"""The peak of real training steps on one GPU, beside what `refopt plan` says of them beforehand.

    python -m tests.bench.gpu_peaks [--more] [--only 7B,qlora] [--commit HASH] [--json docs/bench/peaks.json]

transformers' Llama with random weights, plain torch, the optimizers of this package; 100M to 7B weights. A set-up takes
three steps; the third is measured: bytes of torch's allocator and CuPy's pool at the highest, by phase. Each prints
what was predicted of every moment, so that the model can be mended from the output; what was measured is kept as JSON,
which `tests/planner/test_peaks.py` holds the prediction against. `--only` takes words of labels.

Without a GPU the script is tried on small shapes, and nothing is recorded.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import refopt
from refopt.planner import Row, Run, Setup, card
from refopt.planner.snippet import building
from refopt.planner.table import moments_of, row
from tests.bench.clocks import tidy
from tests.bench.record import RESULTS, Limit, Recorder, arguments, software

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PEAKS = RESULTS.with_name("peaks.json")
PACKAGES = ("torch", "cupy-cuda13x", "numpy", "transformers", "peft")
SECONDS = 345
BF16 = torch.bfloat16

SIZES = {
    "100M": refopt.models.llama("100M", 768, 12, 12, 2048),
    "350M": refopt.models.llama("350M", 1024, 24, 16, 2816),
    "1B": refopt.models.named("llama-3.2-1b"),
    "3B": refopt.models.named("llama-3.2-3b"),
    "7B": refopt.models.named("llama-2-7b"),
    "tiny": refopt.models.llama("tiny", 64, 2, 4, 96, vocab=128),
}
"""Models by what set-ups call them."""


@dataclass(frozen=True)
class Case:
    """One training: a size and a set-up of the planner, with its tokens."""

    size: str
    name: str
    weights: str = "bf16"
    method: str = "full"
    place: str = "resident"
    release: bool = False
    batch: int = 1
    sequence: int = 2048
    checkpoint: bool = True
    rank: int = 16

    @property
    def setup(self) -> Setup:
        return Setup(self.method, self.weights, self.name, self.place, self.release)

    @property
    def run(self) -> Run:
        return Run(SIZES[self.size], card("h100"), self.batch, self.sequence, self.checkpoint, self.rank)

    @property
    def label(self) -> str:
        """Size, set-up and tokens."""
        kept = "ckpt" if self.checkpoint else "plain"
        rank = f" r{self.rank}" if self.method != "full" else ""
        return f"{self.size} {self.setup.label}{rank} {self.batch}x{self.sequence} {kept}"

    @property
    def said(self) -> Row:
        """What the planner says."""
        return row(self.run, self.setup)


CASES = (
    Case("100M", "AdamW", batch=8, sequence=1024, checkpoint=False),
    Case("100M", "AdamW", "f32", batch=4, sequence=1024, checkpoint=False),
    Case("100M", "AdamW8bit", "bf16_sr", batch=8),
    Case("350M", "AdamW8bit", batch=8, sequence=1024, checkpoint=False),
    Case("350M", "Lion8bit", batch=4),
    Case("350M", "AdamW", "f32", batch=2),
    Case("1B", "AdamW", checkpoint=False),
    Case("1B", "AdamW8bit", "bf16_rem16", batch=4, sequence=1024),
    Case("1B", "AdamW8bit", place="paged", sequence=512),
    Case("1B", "Adafactor", batch=2, sequence=1024),
    Case("3B", "AdamW8bit"),
    Case("3B", "Lion8bit", sequence=4096, checkpoint=False),
    Case("3B", "AdamW", method="lora", batch=2, sequence=1024, checkpoint=False),
    Case("7B", "AdamW8bit", sequence=512),
    Case("7B", "Lion8bit", "bf16_rem16"),
    Case("7B", "AdamW8bit", "bf16_sr", release=True, sequence=1024),
    Case("7B", "AdamW", method="lora"),
    Case("7B", "AdamW", method="qlora", rank=64),
    Case("7B", "AdamW8bit", method="qlora", rank=64, sequence=512, checkpoint=False),
    Case("7B", "AdamW8bit", place="paged", sequence=1024),
)
"""What is measured, the least first."""
MORE = (
    Case("350M", "APOLLO-Mini", batch=2),
    Case("350M", "GaLoreAdamW", "f32", sequence=512),
    Case("1B", "Muon", sequence=512),
    Case("1B", "Muon8bit", release=True),
    Case("1B", "GaLoreAdamW8bit", sequence=512),
    Case("1B", "APOLLOAdamW", sequence=512),
    Case("1B", "APOLLOAdamW8bit", sequence=512),
    Case("1B", "AdamMini"),
    Case("1B", "CAME8bit", sequence=512),
    Case("1B", "LAMB8bit", sequence=512),
    Case("1B", "SM3", sequence=512),
    Case("1B", "AdEMAMix8bit", sequence=512),
    Case("7B", "Adafactor", release=True, sequence=1024),
    Case("1B", "GaLoreAdamW8bit", release=True, sequence=1024),
)
"""With `--more`: rules of matrices and of whole tensors. Where projections are looked for again now and then, they are
in the step that is measured."""


def built(case: Case) -> Any:
    """The model with random weights, adapters and checkpoints as the snippet of the set-up makes them."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    made = _qlora(case) if case.method == "qlora" else _plain(case)
    if case.checkpoint:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made.train()


def config(case: Case) -> Any:
    from transformers import LlamaConfig

    m = SIZES[case.size]
    return LlamaConfig(
        hidden_size=m.hidden,
        intermediate_size=m.ffn,
        num_hidden_layers=m.layers,
        num_attention_heads=m.heads,
        num_key_value_heads=m.kv * m.heads // m.hidden,
        vocab_size=m.vocab,
        tie_word_embeddings=m.tensors[-1][0] != "lm_head",
        use_cache=False,
    )


def _plain(case: Case) -> Any:
    from transformers import LlamaForCausalLM

    torch.set_default_dtype(torch.float32 if case.weights == "f32" else BF16)
    try:
        with torch.device(DEVICE):
            made: Any = LlamaForCausalLM(config(case))
    finally:
        torch.set_default_dtype(torch.float32)
    if case.method == "lora":
        from peft import get_peft_model

        from refopt_cuda.nn import peft

        chosen = peft.config(r=case.rank, lora_alpha=case.rank)
        made = get_peft_model(made, chosen, autocast_adapter_dtype=False)
    return made


def _qlora(case: Case) -> Any:
    """4-bit weights, a layer at a time."""
    from accelerate import init_empty_weights
    from transformers import LlamaForCausalLM

    from refopt_cuda import nn

    with init_empty_weights(include_buffers=False):
        made = LlamaForCausalLM(config(case))
    shapes = {n: p.shape for n, p in made.named_parameters()}

    def weights(key: str) -> torch.Tensor | None:
        if key not in shapes:
            return None
        w = torch.empty(shapes[key], device=DEVICE, dtype=BF16)
        return w.normal_(std=0.02) if w.ndim == 2 else w.fill_(1)

    nn.prepare(made, weights=weights, device=DEVICE)
    return nn.adapt(made, r=case.rank, alpha=case.rank)


def optimizers(case: Case, made: Any) -> list[Any]:
    """Those that the lines of the planner make, or a stepper in backward."""
    import refopt_cuda as rc

    known = {"torch": torch, "rc": rc, "model": made}
    exec("\n".join(building(case.setup, case.run.directions)), known)
    return [known[name] for name in ("stepper", "opt", "rest") if name in known]


def held(peak: bool = False) -> int:
    """Bytes of torch's arrays, now or at the most since the last look, and of CuPy's pool."""
    if DEVICE != "cuda":
        return 1
    import cupy

    ours = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if peak:
        torch.cuda.reset_peak_memory_stats()
    return ours + cupy.get_default_memory_pool().total_bytes()


def measured(case: Case) -> dict[str, int]:
    """Bytes by phase of a third step: what was built, what lies there between steps, and the highest of each phase."""
    tidy(DEVICE)
    held(peak=True)
    made = built(case)
    tidy(DEVICE)
    out = {"built": held()}
    opts = optimizers(case, made)
    ids = torch.randint(0, SIZES[case.size].vocab, (case.batch, case.sequence), device=DEVICE)
    for last in (False, False, True):
        if last:
            project_again(opts)
        held(peak=True)
        out["between"] = held()
        loss = made(input_ids=ids, labels=ids).loss
        out["kept"], out["forward"] = held(), held(peak=True)
        loss.backward()
        out["graded"], out["backward"] = held(), held(peak=True)
        for opt in () if case.release else opts:
            opt.step()
        out["stepped"], out["step"] = held(), held(peak=True)
        for opt in () if case.release else opts:
            opt.zero_grad()
        del loss
    for opt in opts if case.release else ():
        opt.remove()  # hooks that weights keep keep the optimizer
    out["peak"] = max(out[phase] for phase in ("forward", "backward", "step"))
    if DEVICE == "cuda":
        out["reserved"] = torch.cuda.max_memory_reserved()
    return out


def project_again(opts: Sequence[torch.optim.Optimizer]) -> None:
    """Have the next step look for new projections, where the rule has any."""
    for group in (group for opt in opts for group in opt.param_groups if "update_proj_gap" in group):
        group["update_proj_gap"] = 1


def one(rec: Recorder, case: Case) -> dict[str, Any]:
    """Measure, print beside what was said, record."""
    start, found = time.monotonic(), measured(case)
    said = case.said
    rec.add(case.label, case.setup.cls, "peak_bytes", found["peak"], "B", "refopt plan", found["peak"] / said.peak)
    if "reserved" in found:
        rec.add(
            case.label, case.setup.cls, "reserved", found["reserved"], "B", "peak", found["reserved"] / found["peak"]
        )
    print("   measured", {name: round(size / 1e6, 1) for name, size in found.items()})
    moments = moments_of(case.run, case.setup)
    print("   said    ", {name: round(need.total / 1e6, 1) for name, need in moments.items()})
    parts = said.parts._asdict()
    print("   parts   ", {name: round(size / 1e6, 1) for name, size in parts.items() if size}, "MB", flush=True)
    print(f"   {time.monotonic() - start:.1f} s", flush=True)
    return {"case": asdict(case), "commit": rec.commit, "measured": found, "said": said.peak}


def main() -> None:
    parser = arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--json", type=Path, help="where what was measured is kept")
    parser.add_argument("--more", action="store_true", help="rules of matrices and of whole tensors instead")
    args = parser.parse_args()
    args.json = args.json or (PEAKS.with_name("peaks_more.json") if args.more else PEAKS)
    wanted = MORE if args.more else CASES
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else ""
    rec = Recorder("gpu_peaks", name, software(*PACKAGES), args.commit, args.out)
    args.dry |= DEVICE == "cpu"
    if not args.dry:
        rec.check()
    limit, rows = Limit(SECONDS), []
    tiny = {"size": "tiny", "batch": 1, "sequence": 16, "rank": 4}
    cases = wanted if DEVICE == "cuda" else tuple(replace(c, **tiny) for c in wanted)
    for case in cases:
        if args.only and not any(word in case.label.split() for word in args.only):
            continue
        if not limit.allows(case.label, 15):
            continue
        try:
            rows.append(one(rec, case))
        except Exception as error:
            print(f"{case.label}: FAILED: {type(error).__name__}: {str(error)[:300]}", flush=True)
            traceback.print_exc()
        release()
        if not args.dry:
            rec.save()
            kept = {"device": name, "software": software(*PACKAGES), "rows": rows}
            args.json.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    limit.say()


def release() -> None:
    """Nothing of one set-up is left for the next."""
    from refopt_cuda.nn import scratch

    scratch.release()
    if DEVICE == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
    tidy(DEVICE)


if __name__ == "__main__":
    main()
