"""Places beside a backward pass, and beside each other: what is hidden, and where the host is faster than the link.

    python -m tests.bench.gpu_host [--parts link,backward,places] [--batch 4] [--quick] [--commit HASH]

link      as in gpu_paged: the ceiling
backward  Llama-3.2-1B on sequences of 2,048 tokens, 8-bit states: forward, backward and a step in each place
          ms        an iteration, many in a row
          exposed   (ms - that of forward and backward alone) / the time of the paged step alone
          transfer  (ms - that with all states resident) / the time of the paged step alone: what is not hidden of the
                    way of the states; at most 0.15 is wanted
places    a step of Llama-3.2-1B's tensors with no state on the device: streamed, on the host, and split by the plan
          ms        a step, all copies waited for
          of_plan   the seconds that the plan of place="auto" said / what it took

With --device cpu --smaller 16 --dry the script can be tried without a GPU.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from refopt_cuda import optim
from tests.bench import clocks, models
from tests.bench.gpu_paged import Bench, finish, launch, link, per_step, tries

WAYS: dict[str, dict[str, Any]] = {
    "AdamW8bit": {},
    "PagedAdamW8bit": {"place": "paged"},
    "PagedAdamW8bit during_backward": {"place": "paged", "during_backward": True},
    "PagedAdamW8bit during_backward with a resident embedding": {"place": "paged", "during_backward": True},
    "AdamW8bit on the host": {"place": "host"},
    "AdamW8bit on the host during_backward": {"place": "host", "during_backward": True},
    "AdamW8bit on the host delay=1": {"place": "host", "delay": 1},
}
STATES: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "AdamW + bf16_rem16": {"codecs": {"p": "bf16_rem16"}},
    "AdamW8bit": {},
}


def model(b: Bench) -> torch.nn.Module:
    """Llama-3.2-1B with random weights in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    by = b.args.smaller
    config = LlamaConfig(
        vocab_size=128256 // by,
        hidden_size=2048 // by,
        intermediate_size=8192 // by,
        num_hidden_layers=max(1, 16 // by),
        num_attention_heads=max(1, 32 // by),
        num_key_value_heads=max(1, 8 // by),
        head_dim=64,
        tie_word_embeddings=True,
        use_cache=False,
        dtype="bfloat16",
    )
    with torch.device(b.device):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def backward(b: Bench) -> None:
    """Each way's iteration above that of forward and backward."""
    net = model(b)
    work = f"llama1b-2048x{b.args.batch}"
    vocabulary = net.config.vocab_size  # type: ignore[union-attr]
    x = torch.randint(vocabulary, (b.args.batch, 2048 // b.args.smaller), device=b.device)
    times = 3 if b.args.quick else 10

    def passes() -> None:
        for p in net.parameters():
            p.grad = None
        net(input_ids=x, labels=x).loss.backward()

    alone = per_step(passes, lambda: clocks.synchronize(b.device), times)
    b.rec.add(work, "forward and backward", "ms", alone, "ms")
    transfer = paged_step(b, net, passes, times)
    b.rec.add(work, "PagedAdamW8bit step alone", "ms", transfer, "ms")
    for label, options in WAYS.items():
        tries(
            b, label, lambda label=label, options=options: way(b, net, passes, (work, label, options), alone, transfer)
        )


def paged_step(b: Bench, net: torch.nn.Module, passes: Callable[[], Any], times: int) -> float:
    opt = optim.PagedAdamW8bit(net.parameters(), lr=1e-6)
    passes()
    opt.step()
    return per_step(opt.step, finish(b, opt), times)


def way(b: Bench, net: torch.nn.Module, passes: Callable[[], Any], named: Any, alone: float, transfer: float) -> None:
    work, label, options = named
    if "resident embedding" in label:
        options = {**options, "resident_bytes": int(2.05 * max(p.numel() for p in net.parameters()))}
    opt = optim.AdamW8bit(net.parameters(), lr=1e-6, **options)

    def iteration() -> None:
        passes()
        opt.step()

    for _ in range(2):
        iteration()
    wait = finish(b, opt) if options else lambda: clocks.synchronize(b.device)
    ms = per_step(iteration, wait, 3 if b.args.quick else 10)
    b.rec.add(work, label, "ms", ms, "ms")
    against = f"transfer {transfer:.4g} ms"
    b.rec.add(work, label, "exposed", ms - alone, "ms", against, (ms - alone) / transfer)
    resident = b.value("AdamW8bit", "ms")
    if resident is not None and label != "AdamW8bit":
        b.rec.add(work, label, "transfer", ms - resident, "ms", against, (ms - resident) / transfer)


# --------------------------------------------------------------------------------------------------------------- places


def compared(b: Bench) -> None:
    """The crossover: float32 states are stepped sooner on the host, codes stream, if the host is fast enough."""
    work = b.work(models.llama1b())
    for name, options in STATES.items():
        for place in ("paged", "host", "auto"):
            label = f"{name} {place}"
            tries(b, label, lambda n=name, o=options, p=place, label=label: placed(b, work, (n, o, p), label))


def placed(b: Bench, work: models.Work, named: Any, label: str) -> None:
    name, options, place = named
    params = models.parameters(work, b.device)
    opt = getattr(optim, name.split()[0])(params, lr=1e-4, place=place, resident_bytes=0, **options)
    opt.step()
    taken = []
    wait = finish(b, opt)
    for _ in range(3 if b.args.quick else 10):
        wait()
        start = time.perf_counter()
        opt.step()
        wait()
        taken.append(1e3 * (time.perf_counter() - start))
    ms = statistics.median(taken[1:])
    b.rec.add(work.name, label, "ms", ms, "ms")
    for plan in opt.plan.values():
        print(plan, flush=True)
        told = 1e3 * plan.load.seconds
        b.rec.add(work.name, label, "of_plan", ms, "ms", f"plan {told:.4g} ms", told / ms)
        share = sum(n.elements for n, at in zip(plan.needs, plan.places, strict=True) if at == "host") / work.size
        b.rec.add(work.name, label, "on_host", share, "of elements")


PARTS: dict[str, Callable[[Bench], None]] = {"link": link, "backward": backward, "places": compared}


def main(argv: Sequence[str] | None = None) -> Bench:
    return launch("gpu_host", __doc__ or "", PARTS, argv)


if __name__ == "__main__":
    main(sys.argv[1:])
