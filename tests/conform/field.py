"""`python -m tests.conform.field` writes docs/field.md: scorecards of the peers that can be imported, and what differs.

Every reproduction on the page is run, and what it prints is what the page shows; one that fails stops the page.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import multiprocessing
import platform
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from refopt import conform
from refopt.conform.report import LEVELS, Finding, Report
from tests.conform import field_gpu
from tests.conform.gpu_deviations import DEVIATIONS as ON_GPU
from tests.conform.peers import PEERS, Peer, importable

PAGE = Path(__file__).resolve().parents[2] / "docs/field.md"
NAMES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "optimi": "torch-optimi", "lion_pytorch": "lion-pytorch"}
NAMES |= {"pytorch_optimizer": "pytorch_optimizer", "schedulefree": "schedulefree", "transformers": "transformers"}


class Deviation(NamedTuple):
    """A heading, what differs and when it matters, ten lines that show it, the upstream issue if one is known."""

    title: str
    package: str
    text: str
    code: str
    issue: str = ""


DEVIATIONS = [
    Deviation(
        "torch: a running mean is a lerp",
        "torch",
        "`torch.optim` writes m + (1 - beta1)(g - m), the paper beta1 m + (1 - beta1) g. The same number, rounded elsewhere: a few "
        "units of the last place of what goes in. Not a deviation; it is why bits differ.",
        """import torch
m, g = torch.tensor(1.0), torch.tensor(-0.3)
print(f"{m.lerp(g, 1 - 0.9).item():.9f}", f"{(0.9 * m + (1 - 0.9) * g).item():.9f}")
m, g = torch.tensor(1.0), torch.tensor(-8.9999)
print(f"{m.lerp(g, 1 - 0.9).item():.9e}", f"{(0.9 * m + (1 - 0.9) * g).item():.9e}")
""",
    ),
    Deviation(
        "torch and most that follow it: bfloat16 weights have bfloat16 states",
        "torch",
        "States are made `zeros_like(p)`. A second moment of eight bits never forgets under beta2 = 0.999: a thousandth less rounds "
        "back to what it was. lion-pytorch, optimi and pytorch_optimizer do the same (optimi adds a Kahan compensation to the "
        "weights); bitsandbytes keeps float32. Keep float32 weights, or a second moment of its own.",
        """import torch
p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
opt = torch.optim.AdamW([p])
p.grad = torch.ones_like(p)
for t in range(1000):
    opt.step()
    if t == 0:
        p.grad, first = torch.zeros_like(p), opt.state[p]["exp_avg_sq"][0].item()
v = opt.state[p]["exp_avg_sq"]
print(v.dtype, "left of the first:", v[0].item() / first, "in float32:", round(0.999**999, 3))
""",
        "AReaL#1292",
    ),
    Deviation(
        "torch and others: bfloat16 weights do not decay",
        "torch",
        "Half a unit of bfloat16's last place is some 0.002 of a weight: 1 - lr wd nearer to 1 than that rounds back to where it was. So it "
        "is in bitsandbytes and in optimi, whose compensation has the step in it and not the decay. What keeps decay is a float32 master, "
        "stochastic rounding (torchao's `bf16_stochastic_round`) or a compensation that includes it.",
        """import torch
p = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
opt = torch.optim.AdamW([p], lr=1e-3, weight_decay=0.1)
p.grad = torch.zeros_like(p)
for t in range(1000):
    opt.step()
print("left:", p[0].item(), "meant:", round((1 - 1e-4) ** 1000, 3))
""",
        "OneTrainer#996, bitsandbytes#1165, optimi#15",
    ),
    Deviation(
        "bitsandbytes: Adam decouples its weight decay",
        "bitsandbytes",
        "`Adam(weight_decay=...)` computes AdamW. Without weight decay there is no difference. Who moves from `torch.optim.Adam` with a "
        "decay gets another regularizer.",
        """import bitsandbytes as bnb
import torch
def stepped(make):
    p = torch.nn.Parameter(torch.full((4,), 2.0))
    opt = make([p], lr=0.1, weight_decay=0.1)
    p.grad = torch.full((4,), 1e-3)
    opt.step()
    return round(p[0].item(), 6)
print(stepped(torch.optim.Adam), stepped(torch.optim.AdamW), stepped(bnb.optim.Adam))
""",
        "facebookresearch/bitsandbytes#10, which says that it is meant so",
    ),
    Deviation(
        "bitsandbytes: amsgrad is accepted and ignored",
        "bitsandbytes",
        "The 32-bit `Adam` and `AdamW` take `amsgrad=True` and keep no maximum; the 8-bit classes refuse it with a sentence.",
        """import bitsandbytes as bnb
import torch
def stepped(amsgrad):
    p = torch.nn.Parameter(torch.ones(4))
    opt = bnb.optim.AdamW([p], betas=(0.9, 0.9), amsgrad=amsgrad)
    for g in (10.0, 0.1, 0.1, 0.1):
        p.grad = torch.full((4,), g)
        opt.step()
    return p[0].item()
print(stepped(False) == stepped(True))
""",
        "bitsandbytes#1261",
    ),
    Deviation(
        "bitsandbytes: AdEMAMix32bit allocates half of its first state",
        "bitsandbytes",
        "`AdEMAMix` keeps two means in one buffer of twice the size; `AdEMAMix32bit` makes that buffer of the single size. On a CPU the "
        "first step raises. `AdEMAMix` itself, which is 32-bit unless told otherwise, is right.",
        """import bitsandbytes as bnb
import torch
p = torch.nn.Parameter(torch.ones(64, 96))
opt = bnb.optim.AdEMAMix32bit([p])
p.grad = torch.ones_like(p)
try:
    opt.step()
except RuntimeError as error:
    print(type(error).__name__, error)
print(tuple(opt.state[p]["state1"].shape))
""",
        "bitsandbytes#2075",
    ),
    Deviation(
        "bitsandbytes: SGD ignores dampening and nesterov, RMSprop momentum",
        "bitsandbytes",
        "They are arguments of the constructors and do not reach the update. `centered=True`, `lr_decay` and `initial_accumulator_value` "
        "are refused with a sentence.",
        """import bitsandbytes as bnb
import torch
def stepped(cls, **words):
    p = torch.nn.Parameter(torch.ones(4))
    opt = cls([p], lr=0.1, **words)
    for _ in range(3):
        p.grad = torch.ones(4)
        opt.step()
    return round(p[0].item(), 4)
for words in ({"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.5}, {"momentum": 0.9, "nesterov": True}):
    print(words, "torch", stepped(torch.optim.SGD, **words), "bitsandbytes", stepped(bnb.optim.SGD, **words))
print("torch", stepped(torch.optim.RMSprop, momentum=0.9), "bitsandbytes", stepped(bnb.optim.RMSprop, momentum=0.9))
""",
        "bitsandbytes#2085",
    ),
    Deviation(
        "bitsandbytes: LAMB and LARS cut a step, the papers set its length",
        "bitsandbytes",
        "LAMB is AdamW whose update is shortened where it is longer than `max_unorm` times the weights, its length taken before the bias "
        "correction; LARS is momentum shortened the same way. Neither ever lengthens a step. The reference has both: `variant=clip`.",
        """import bitsandbytes as bnb
import torch
for size in (1.0, 100.0):
    p = torch.nn.Parameter(torch.full((64,), size))
    opt = bnb.optim.LAMB([p], lr=0.01)
    p.grad = torch.ones(64)
    opt.step()
    print("weights of", size, "move", round(size - p[0].item(), 5), "by the paper", 0.01 * size)
""",
    ),
    Deviation(
        "bitsandbytes on a CPU: zero is not stored as zero",
        "bitsandbytes",
        "The CPU library finds a code through a table of its own, which has nothing between -2.1e-5 and 2.1e-5 of a block's largest "
        "element: 0 comes back as 2.1e-5 of it, and further up codes beside the nearest are taken. Harmless where a block's elements are "
        "of like size. This says nothing of the CUDA kernels, which search the table itself.",
        """import bitsandbytes.functional as F
import torch
x = torch.zeros(256)
x[0] = 1.0
code = F.create_dynamic_map(signed=True)
codes, absmax = torch.ops.bitsandbytes.quantize_blockwise(x, code, 256)
print("0 is stored as", code[codes[1].long()].item(), "and the table has 0 at", (code == 0).nonzero().item())
""",
    ),
    Deviation(
        "torchao: bias corrections in float32",
        "torchao",
        "The count of steps is a float32 tensor, so 1 - beta2^t is taken in float32, where a beta2 near 1 has lost digits: the first step "
        "is off by some 6e-6 of its length under the default. Small beside everything that 8 bits do.",
        """import torch
step = torch.tensor(1.0)
for beta2 in (0.999, 0.9999):
    print(beta2, (1 - beta2**step).item(), "exactly", round(1 - beta2, 9))
""",
    ),
    Deviation(
        "torchao: small or odd tensors of bfloat16 weights keep bfloat16 states",
        "torchao",
        "A tensor of fewer than 4,096 elements, or whose size is no multiple of the block, is not quantized; its states take the dtype of "
        "the weights. See above for what that does to a second moment.",
        """import torch
from torchao.optim import AdamW8bit
for shape in ((64, 64), (65, 64), (1000,)):
    p = torch.nn.Parameter(torch.ones(shape, dtype=torch.bfloat16))
    opt = AdamW8bit([p])
    p.grad = torch.ones_like(p)
    with torch.compiler.set_stance("force_eager"):
        opt.step()
    v = opt.state[p]["exp_avg_sq"]
    print(shape, type(v).__name__, v.codes.dtype if hasattr(v, "codes") else v.dtype)
""",
    ),
    Deviation(
        "torchao: amsgrad raises at the first step",
        "torchao",
        "The quantized maximum is compared with `torch.maximum`, which the state's class does not implement (the same with and without "
        "`torch.compile` in these versions).",
        """import torch
from torchao.optim import AdamW8bit
p = torch.nn.Parameter(torch.ones(64, 64))
opt = AdamW8bit([p], amsgrad=True)
p.grad = torch.ones_like(p)
try:
    with torch.compiler.set_stance("force_eager"):
        opt.step()
except NotImplementedError as error:
    print(str(error)[:100])
""",
    ),
    Deviation(
        "optax: bias corrections in float32",
        "optax",
        "As torchao's: powers of beta and what they are taken from are float32 arrays, as JAX computes unless told otherwise. Adam, AdamW, "
        "LAMB, AdEMAMix and Schedule-Free have it. The first step is off by some 1e-4 of its length for a beta2 of 0.9999.",
        """import numpy as np
import optax
for b2 in (0.999, 0.9999):
    tx = optax.adam(0.1, b2=b2)
    p, g = np.zeros(4, np.float32), np.ones(4, np.float32)
    u, _ = tx.update(g, tx.init(p), p)
    print(b2, "the first step is", round(-u[0].item(), 7), "of 0.1")
""",
    ),
    Deviation(
        "optax: eps stands under the root in RMSprop and Adagrad",
        "optax",
        "As in TensorFlow and Keras, and documented: 1 / sqrt(v + eps), where torch has 1 / (sqrt(v) + eps). For RMSprop "
        "`eps_in_sqrt=False` gives torch's. The reference has both: `eps_at`. With momentum, the buffer of RMSprop and LARS holds minus the "
        "step, lr in it, so that a rate that changes takes its time to be felt.",
        """import numpy as np
import optax
for where in (True, False):
    tx = optax.rmsprop(0.1, decay=0.99, eps=1e-2, eps_in_sqrt=where)
    p, g = np.zeros(4, np.float32), np.full(4, 0.1, np.float32)
    u, _ = tx.update(g, tx.init(p), p)
    print("eps_in_sqrt", where, "step", round(u[0].item(), 5))
""",
        "optax#532",
    ),
    Deviation(
        "optimi: moments are stored corrected",
        "optimi",
        "Instead of correcting m and v when they are used, optimi changes the betas with t, so that what is stored is m / (1 - beta1^t) "
        "and v / (1 - beta2^t). The weights move as torch's do. A checkpoint's moments mean something else.",
        """import optimi
import torch
p = torch.nn.Parameter(torch.ones(4))
opt = optimi.AdamW([p], lr=0.1)
p.grad = torch.ones(4)
opt.step()
print("exp_avg", opt.state[p]["exp_avg"][0].item(), "in torch", round(1 - 0.9, 6))
""",
    ),
    Deviation(
        "optimi: dampening is a switch",
        "optimi",
        "`SGD(dampening=True)` means dampening = momentum, and applies to the first gradient too, as documented there; any number passed "
        "for it counts as True.",
        """import optimi
import torch
for make, damp in ((torch.optim.SGD, 0.5), (optimi.SGD, 0.5), (optimi.SGD, True)):
    p = torch.nn.Parameter(torch.ones(4))
    opt = make([p], lr=0.1, momentum=0.9, dampening=damp)
    p.grad = torch.ones(4)
    opt.step()
    print(make.__module__, damp, round(p[0].item(), 4))
""",
    ),
    Deviation(
        "optimi and others: a step writes into the gradient",
        "optimi",
        "Coupled decay is added to `p.grad` itself. Nothing is wrong unless the gradient is read after the step. schedulefree and some "
        "of pytorch_optimizer do it too.",
        """import optimi
import torch
p = torch.nn.Parameter(torch.ones(4))
opt = optimi.Adam([p], lr=0.1, weight_decay=0.5)
p.grad = torch.ones(4)
opt.step()
print(p.grad[0].item())
""",
    ),
    Deviation(
        "transformers: Adafactor's factors come back as bfloat16",
        "transformers",
        "Under bfloat16 weights the factors are float32, and `load_state_dict` casts them to the dtype of the weights, as torch's base "
        "class does with every floating state. With float32 weights a resumed run has the bits of one that was never stopped.",
        """import torch
from transformers.optimization import Adafactor
p = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
opt, again = Adafactor([p]), Adafactor([p])
p.grad = torch.full_like(p, 0.3)
opt.step()
again.load_state_dict(opt.state_dict())
print(opt.state[p]["exp_avg_sq_row"].dtype, again.state[p]["exp_avg_sq_row"].dtype)
""",
    ),
    Deviation(
        "Adafactor: torch's is another dialect than transformers'",
        "transformers",
        "torch takes lr as the cap of the relative step and decays by it, and treats eps1 as a floor; transformers adds eps1 to g^2. The "
        "reference has both: `variant=torch`. They part where gradients are tiny.",
        """import torch
from transformers.optimization import Adafactor
for make in (torch.optim.Adafactor, Adafactor):
    p = torch.nn.Parameter(torch.ones(4, 4))
    opt = make([p])
    p.grad = torch.full((4, 4), 1e-10)
    opt.step()
    print(make.__module__, 1 - p[0, 0].item())
""",
    ),
    Deviation(
        "pytorch_optimizer: AdEMAMix couples its decay unless told otherwise",
        "pytorch_optimizer",
        "`weight_decouple` is False by default there, where the paper's algorithm decouples; `SGDW` decouples, as its name says.",
        """import torch
from pytorch_optimizer import AdEMAMix
for words in ({}, {"weight_decouple": True}):
    p = torch.nn.Parameter(torch.full((4,), 2.0))
    opt = AdEMAMix([p], lr=0.1, weight_decay=0.1, **words)
    p.grad = torch.full((4,), 1e-3)
    opt.step()
    print(words, round(p[0].item(), 5))
""",
    ),
]


def ran(code: str) -> str:
    """What a reproduction prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(code, "<reproduction>", "exec"), {"__name__": "__main__"})
    return out.getvalue().rstrip()


def version(package: str) -> str:
    return importlib.metadata.version(NAMES.get(package, package))


def cell(report: Report, level: str) -> str:
    """A level in a word: yes, the diagnoses, or a dash where nothing was asked."""
    ids = sorted({f.id + ("" if "@" not in f.setting else " (bf16)") for f in report.of(level) if f.status == "fail"})
    if ids:
        return ", ".join(ids)
    return {"pass": "yes", "skip": "-", "": "-"}[report.worst(level)]


def how(report: Report) -> str:
    """How L1 was asked, and the farthest element of the first setting."""
    first = next((f for f in report.of("L1") if "worst_ulps" in f.data), None)
    if first is None:
        return "-"
    return f"{first.data['mode']}, {max(map(float, first.data['worst_ulps'].values()), default=0):.3g}"


def asked(peer: Peer) -> Report:
    return conform.run(peer.target, peer.claim, **peer.options)


def scored(peers: list[Peer]) -> Iterator[tuple[Peer, Report]]:
    """Every target under every claim once, two at a time."""
    once = list({(peer.target, peer.claim): peer for peer in reversed(peers)}.values())[::-1]
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for peer, report in zip(once, pool.map(asked, once)):
            print(peer.target, peer.claim, f"{report.seconds:.1f} s", file=sys.stderr, flush=True)
            yield peer, report


def rows(found: list[tuple[Peer, Report]]) -> Iterator[str]:
    yield "| target | as | L1: start of a step, ulps | " + " | ".join(LEVELS) + " |"
    yield "|---" * (3 + len(LEVELS)) + "|"
    for peer, report in found:
        cells = " | ".join(cell(report, level) for level in LEVELS)
        yield f"| `{peer.target}` | `{peer.claim}` | {how(report)} | {cells} |"


def gpu(measured: dict[str, Any]) -> Iterator[str]:
    """The part of the page that a GPU wrote: scorecards, then the reproductions that held."""
    versions = ", ".join(f"{n} {measured[n]}" for n in field_gpu.PACKAGES if n in measured)
    yield ON_A_GPU.format(**measured | {"versions": versions})
    yield "\n".join(gpu_rows(measured["rows"])) + "\n"
    texts = {d.title: d for d in ON_GPU}
    for r in measured["reproductions"]:
        d = texts.get(r["title"])
        if d and d.code == r["code"] and r["holds"]:
            issue = f" Upstream: {d.issue}." if d.issue else ""
            yield f"### {d.title}\n\n{d.text}{issue}\n\n```python\n{d.code}```\n\n```text\n{r['printed']}\n```\n"
    if unseen := [r["title"] for r in measured["reproductions"] if not r["holds"]]:
        yield "Looked for and not seen with these versions: " + "; ".join(unseen) + ".\n"


def gpu_rows(measured: list[dict[str, Any]]) -> Iterator[str]:
    yield "| target | as | L1: start of a step, ulps | " + " | ".join(LEVELS) + " |"
    yield "|---" * (3 + len(LEVELS)) + "|"
    for row in measured:
        report = Report(row["target"], row["claim"], [Finding(**f) for f in row.get("findings", ())])
        cells = " | ".join(cell(report, level) for level in LEVELS)
        start = f"did not finish: {row['error']}" if "error" in row else how(report)
        yield f"| `{row['target']}` | `{row['claim']}` | {start} | {cells} |"


def page(found: list[tuple[Peer, Report]], without: dict[str, str]) -> str:
    packages = sorted({peer.package for peer, _ in found})
    installed = packages + (["jax"] if "optax" in packages else [])
    versions = ", ".join(f"{NAMES.get(n, n)} {version(n)}" for n in installed)
    measured = field_gpu.held()
    also = ALSO if measured else ALONE
    out = [HEAD.format(versions=versions, python=platform.python_version(), machine=platform.machine(), also=also)]
    out += ["\n".join(rows(found)), "", LEGEND]
    for d in DEVIATIONS:
        if d.package in packages:
            issue = f" Upstream: {d.issue}." if d.issue else ""

            out += [f"## {d.title}\n\n{d.text}{issue}\n\n```python\n{d.code}```\n\n```text\n{ran(d.code)}\n```\n"]
    out += [TAIL, *(gpu(measured) if measured else [])]
    if without:
        out += ["Not run: " + "; ".join(sorted(without.values())) + ".\n"]
    return "\n".join(out)


HEAD = """# The field, measured

What `refopt conform` says of optimizers that people use, on a CPU, untold. Made by `python -m tests.conform.field` with {versions};
Python {python}, {machine}. To differ is not to be wrong: most lines below are choices, some documented, and each says when it matters.
Versions move; run the line for the one you have. {also}
"""
ALONE = """bitsandbytes, torchao and FlashOptim have other code on a GPU, of which this page says
nothing."""
ALSO = """bitsandbytes, torchao and FlashOptim have other code on a GPU: it has
[its own part](#on-a-gpu)."""

ON_A_GPU = """## On a GPU

The same on one {device}, by `python -m tests.conform.field_gpu`, commit {commit}, with {versions}; Python {python}, CUDA {cuda}. torch's AdamW
comes first, to know the machine by. Each scorecard and each reproduction was a process of its own.
"""

LEGEND = """A cell says *yes* where every setting passes, else the diagnoses, `(bf16)` for those under bfloat16 weights only. Settings that a
constructor refuses or lacks are not asked. *forced*: each step starts from the reference's numbers; *read*: from the optimizer's own,
decoded; *free*: only the weights could be read. [What the levels ask](conform.md).
"""

TAIL = """## What is not explained

`unexplained` means that no documented dialect, alone or with one other, gives these numbers; it is a statement about the list of dialects
(`refopt/conform/dialects.py`) as much as about the optimizer. A dialect that is missing there is welcome.

`nan-weight` at Adafactor: a weight that is NaN makes the size of its tensor NaN, and the reference lets the whole tensor show it; torch and
transformers take the least size instead. `zero-weights` at LAMB: a step that is cut to a share of the weights leaves a tensor of zeros where
it is. At optax, `no-subnormals` is XLA's: numbers below 1.2e-38 are zero there on a CPU; `special-nan` at Lion: the sign of NaN is NaN in JAX
and 0 in the reference, and at LARS a norm that is NaN is passed on. `state-lost` at torchao's 4 bits: scales are at least 1e-12, beside
which means of 1e-16 have no code but zero. `without-wd` marks settings of a target that takes no weight decay.
`less-state` is what is missing where an option is ignored, or bfloat16 states with a compensation beside them (optimi).
"""


def main() -> int:
    packages = {peer.target.partition(":")[0] for peer in PEERS}
    without = {name: reason for name in packages if (reason := importable(name))}
    found = list(scored([p for p in PEERS if p.target.partition(":")[0] not in without]))
    PAGE.write_text(page(found, without), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
