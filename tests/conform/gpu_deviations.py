"""What peers do on a GPU and not, or not to be seen, on a CPU: a text, some ten lines, and what they must print."""

from __future__ import annotations

import re
from typing import NamedTuple


class GpuDeviation(NamedTuple):
    """As the page's other deviations; `prints` is a pattern that what is printed must hold for the text to be true."""

    title: str
    package: str
    text: str
    code: str
    prints: str
    issue: str = ""

    def holds(self, printed: str) -> bool:
        return re.search(self.prints, printed) is not None


DEVIATIONS = [
    GpuDeviation(
        "bitsandbytes on a GPU: weights decay after the step",
        "bitsandbytes",
        "The CUDA kernels of Adam, AdamW, LAMB and AdEMAMix compute (p - lr u)(1 - lr wd), which shrinks the step too; torch, the papers "
        "and the library's own CPU path compute p (1 - lr wd) - lr u. They part by lr^2 wd u, which matters where lr wd is large.",
        """import bitsandbytes as bnb
import torch
def stepped(make, device):
    p = torch.nn.Parameter(torch.ones(64, device=device))
    opt = make([p], lr=0.1, weight_decay=1.0)
    p.grad = torch.ones_like(p)
    opt.step()
    return round(p[0].item(), 4)
print("torch", stepped(torch.optim.AdamW, "cuda"))
print("bitsandbytes on a CPU", stepped(bnb.optim.AdamW, "cpu"), "on a GPU", stepped(bnb.optim.AdamW, "cuda"))
""",
        r"torch 0\.8\n.*GPU 0\.81",
        "bitsandbytes#2010",
    ),
    GpuDeviation(
        "bitsandbytes and torch: bfloat16 weights do not decay",
        "bitsandbytes",
        "Half a unit of bfloat16's last place is some 0.002 of a weight: 1 - lr wd nearer to 1 than that rounds back to where it was. "
        "The same holds in torch for bfloat16 weights; what keeps decay is a float32 master, stochastic rounding or a compensation.",
        """import bitsandbytes as bnb
import torch
def decayed(make):
    p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16, device="cuda"))
    opt = make([p], lr=1e-3, weight_decay=0.1)
    p.grad = torch.zeros_like(p)
    for _ in range(1000):
        opt.step()
    return p[0].item()
print("torch", decayed(torch.optim.AdamW), "bitsandbytes", decayed(bnb.optim.AdamW8bit), "meant", round((1 - 1e-4) ** 1000, 3))
""",
        r"bitsandbytes 1\.0 ",
        "bitsandbytes#1165",
    ),
    GpuDeviation(
        "bitsandbytes on a GPU: weight decay of RMSprop8bit and Adagrad8bit stays out of the step",
        "bitsandbytes",
        "The blockwise kernels add wd p to the gradient that is squared and then step along the gradient as it came: decay slows weights "
        "down and shrinks none. The 32-bit kernels and the CPU path step along the sum.",
        """import bitsandbytes as bnb
import torch
for make in (bnb.optim.RMSprop8bit, bnb.optim.Adagrad8bit):
    for device in ("cpu", "cuda"):
        p = torch.nn.Parameter(torch.ones(64, 128, device=device))
        opt = make([p], lr=0.01, weight_decay=0.1)
        p.grad = torch.zeros_like(p)
        opt.step()
        print(make.__name__, device, "moves by", round(1 - p[0, 0].item(), 4))
""",
        r"RMSprop8bit cuda moves by 0\.0\n",
    ),
    GpuDeviation(
        "bitsandbytes on a GPU: AdEMAMix8bit's scales overlap where a block is short",
        "bitsandbytes",
        "The kernel finds the scales of the second mean at element n // 256 of a buffer whose second row begins at the next whole block: "
        "where the size is no multiple of 256, the first of them and the last of the first mean are one number, and what Python reads is "
        "one block on. Sizes that are multiples are right.",
        """import bitsandbytes as bnb
import torch
for n in (4096, 4100):
    p = torch.nn.Parameter(torch.zeros(n, device="cuda"))
    opt = bnb.optim.AdEMAMix8bit([p])
    p.grad = (torch.arange(n, device="cuda") // 256 + 1).float()
    opt.step()
    m1, m2 = opt.state[p]["absmax1"].cpu()
    print(n, "block sizes 1 2 3 ... are kept as", [round(x / 1e-4) for x in m2.tolist()][:3])
""",
        r"4100 block sizes 1 2 3 \.\.\. are kept as \[2, 3, 4\]",
    ),
    GpuDeviation(
        "bitsandbytes on a GPU: LAMB8bit and LARS8bit have no kernel",
        "bitsandbytes",
        "Both are made, and raise at the first step of a tensor that is large enough to be stored in 8 bits. On a CPU they step.",
        """import bitsandbytes as bnb
import torch
for make, words in ((bnb.optim.LAMB8bit, {}), (bnb.optim.LARS8bit, {"momentum": 0.9})):
    p = torch.nn.Parameter(torch.ones(64, 128, device="cuda"))
    opt = make([p], lr=0.01, **words)
    p.grad = torch.ones_like(p)
    try:
        opt.step()
        print(make.__name__, "steps")
    except Exception as error:
        print(make.__name__, type(error).__name__, str(error)[:60])
""",
        r"(LAMB8bit|LARS8bit) \w+Error",
        "bitsandbytes#1810",
    ),
    GpuDeviation(
        "bitsandbytes on a GPU: bfloat16 weights of SGD, RMSprop, Adagrad and LARS have no 32-bit kernel",
        "bitsandbytes",
        "Their 8-bit kernels take bfloat16; the 32-bit ones take float32 and float16, so that small tensors raise where large ones step.",
        """import bitsandbytes as bnb
import torch
for make, words in ((bnb.optim.SGD, {"momentum": 0.9}), (bnb.optim.RMSprop, {}), (bnb.optim.Adagrad, {})):
    p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device="cuda"))
    opt = make([p], lr=0.01, **words)
    p.grad = torch.ones_like(p)
    try:
        opt.step()
        print(make.__name__, "steps")
    except Exception as error:
        print(make.__name__, type(error).__name__, str(error)[:60])
""",
        r"SGD \w+Error",
    ),
    GpuDeviation(
        "bitsandbytes on a GPU: a gradient that is NaN is passed over in 8 bits",
        "bitsandbytes",
        "AdamW8bit leaves a weight whose gradient is NaN or infinite where it is and sets its states to zero; the 32-bit class and torch "
        "let it become NaN. It keeps a run alive and hides what made it sick.",
        """import bitsandbytes as bnb
import torch
for make in (torch.optim.AdamW, bnb.optim.AdamW, bnb.optim.AdamW8bit):
    p = torch.nn.Parameter(torch.ones(4096, device="cuda"))
    opt = make([p], lr=0.1, weight_decay=0.0)
    for g in (1.0, float("nan")):
        p.grad = torch.ones_like(p)
        p.grad[0] = g
        opt.step()
    print(make.__module__.partition(".")[0], make.__name__, round(p[0].item(), 4), "beside", round(p[1].item(), 4))
""",
        r"AdamW8bit 0\.\d+ beside",
    ),
    GpuDeviation(
        "bitsandbytes on a GPU: a negative mean never becomes zero",
        "bitsandbytes",
        "The search for the nearest code moves a code whose sign is another than the number's by one: a tiny positive mean is stored as 0, "
        "a tiny negative one as the least negative value.",
        """import bitsandbytes as bnb
import torch
p = torch.nn.Parameter(torch.zeros(4096, device="cuda"))
opt = bnb.optim.Lion8bit([p])
p.grad = torch.zeros_like(p)
p.grad[:3] = torch.tensor([1.0, 1e-9, -1e-9])
opt.step()
s = opt.state[p]
print("1, 1e-9, -1e-9 are stored as", [s["qmap1"][int(code)].item() for code in s["state1"][:3]])
""",
        r", 0\.0, -5",
    ),
    GpuDeviation(
        "bitsandbytes on a GPU: paged states come back unpaged",
        "bitsandbytes",
        "`load_state_dict` moves each state to the device of its weight: what was paged is resident after a resume, which may not fit. "
        "Values are the same.",
        """import bitsandbytes as bnb
import torch
p = torch.nn.Parameter(torch.zeros(1 << 18, device="cuda"))
opt, again = bnb.optim.PagedAdamW8bit([p]), bnb.optim.PagedAdamW8bit([p])
p.grad = torch.ones_like(p)
opt.step()
again.load_state_dict(opt.state_dict())
for name, o in (("made", opt), ("loaded", again)):
    print(name, "paged:", getattr(o.state[p]["state1"], "is_paged", False), "on", o.state[p]["state1"].device.type)
""",
        r"made paged: True.*\nloaded paged: False",
        "bitsandbytes#1344 (a reviewer's remark)",
    ),
    GpuDeviation(
        "FlashOptim: scales are float16",
        "flashoptim",
        "A group's largest magnitude is kept in float16: under gradients of 1e-6 it is off by tenths, under 1e-7 it is zero and the state is "
        "lost, so that the next step divides by eps alone. Gradients of that size are usual without loss scaling in some layers.",
        """import torch
from flashoptim import FlashAdamW
for size in (1e-3, 1e-6, 1e-7):
    p = torch.nn.Parameter(torch.zeros(64, device="cuda"))
    opt = FlashAdamW([p], lr=1e-3, master_weight_bits=None)
    p.grad = torch.full_like(p, size)
    opt.step()
    m, v = (opt.state[p][n].materialize()[0].item() for n in ("exp_avg", "exp_avg_sq"))
    print(f"gradients of {size:g}: m is {m / (0.1 * size):.3f} of what it should be, sqrt(v) {(v / 1e-3) ** 0.5 / size:.3f}")
""",
        r"gradients of 1e-07: m is 0\.000",
    ),
    GpuDeviation(
        "FlashOptim: unquantized states take the format of the weights",
        "flashoptim",
        "With `quantize=False`, m and v of bfloat16 weights are bfloat16; what that does to a second moment stands under torch above.",
        """import torch
from flashoptim import FlashAdamW
p = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16, device="cuda"))
opt = FlashAdamW([p], quantize=False)
p.grad = torch.ones_like(p)
opt.step()
print(opt.state[p]["exp_avg_sq"].materialize().dtype)
""",
        r"bfloat16",
        "flashoptim#2",
    ),
    GpuDeviation(
        "FlashOptim: dampening applies to the first gradient",
        "flashoptim",
        "As its documentation says: the buffer begins at zero and takes (1 - dampening) g, where torch begins it with g.",
        """import torch
from flashoptim import FlashSGD
for make, words in ((torch.optim.SGD, {}), (FlashSGD, {"master_weight_bits": None})):
    p = torch.nn.Parameter(torch.ones(64, device="cuda"))
    opt = make([p], lr=0.1, momentum=0.9, dampening=0.5, **words)
    p.grad = torch.ones_like(p)
    opt.step()
    print(make.__name__, round(p[0].item(), 4))
""",
        r"FlashSGD 0\.95",
    ),
]
