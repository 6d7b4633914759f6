"""
Sharding: who owns which block
==============================

Many ranks share one model: each keeps the states of its part, steps it, and hands the weights round (ZeRO). With coded
states one thing must not happen: that a cut goes through a block, for then two ranks would need one scale.
"""

import tempfile

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import refopt_cuda as rc
from refopt import Optimizer, Partition

# %%
# Four ranks in one process
# -------------------------
# The tensors lie end to end; each rank owns the blocks that begin in its stretch. Rows are cut in blocks for
# themselves, so a row's last block may be short.

rng = np.random.default_rng(0)
params = [rng.standard_normal(shape).astype(np.float32) for shape in ((12, 300), (1000,), (5, 700))]
grads = [rng.standard_normal(p.shape).astype(np.float32) for p in params]
opt = Optimizer("adamw", "dynamic8", lr=1e-3)
part = Partition(opt, params, ranks=4, stage=2)

_, axis = plt.subplots(figsize=(9, 2.2))
starts = np.cumsum([0, *(p.size for p in params)])
for rank, windows in enumerate(part.windows):
    for tensor, first, last in windows:
        axis.barh(0, last - first, left=starts[tensor] + first, color=f"C{rank}", edgecolor="white")
for k, p in enumerate(params):
    axis.axvline(starts[k], color="black", linewidth=1)
    axis.text(starts[k] + p.size / 2, 0.5, f"{p.shape}", ha="center")
axis.set(yticks=[], xlabel="element; a colour is a rank", ylim=(-0.45, 0.75))

# %%
# The bits of one rank
# --------------------
# A step in shards, put together, is the step of the whole: weights, codes and scales.

whole, state = opt.step(params, grads, opt.init(params))
shared, shards = part.step(params, grads, part.scatter(opt.init(params)))
assert all(np.array_equal(a, b) for a, b in zip(whole, shared))
for one, other in zip(part.gather(shards), state):
    assert np.array_equal(one["m"].codes, other["m"].codes) and np.array_equal(one["v"].scales, other["v"].scales)

# %%
# What moves
# ----------
# A rank needs the sum of all gradients of its part, and hands its new weights to all. Stages 1 and 2 move the same and
# differ in what a rank keeps: states, then gradients too. In stage 3 weights are put together for each pass anew.

for stage in (1, 2, 3):
    moves = Partition(opt, params, ranks=4, stage=stage).traffic()
    print(f"stage {stage}:", "; ".join(f"{m.what} {m.way}, {m.bytes:,} bytes" for m in moves))

# %%
# The same with torch
# -------------------
# ``fully_shard`` cuts the parameters, and the drop-in steps the rows that a rank has. One rank is enough to see how it
# is written; ``examples/torchrun/fsdp2.py`` is this for any number, with checkpoints.

folder = tempfile.TemporaryDirectory()
dist.init_process_group("gloo", init_method=f"file://{folder.name}/store", rank=0, world_size=1)


def stepped(sharded):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.GELU(), torch.nn.Linear(128, 96))
    if sharded:
        fully_shard(net)  # first this, then the optimizer
    opt = rc.optim.AdamW8bit(net.parameters(), lr=1e-3)
    for _ in range(3):
        net(torch.ones(4, 96)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return [p.full_tensor() if sharded else p.detach() for p in net.parameters()], opt.state[net[0].weight]["m.codes"]


plain, _ = stepped(sharded=False)
cut, codes = stepped(sharded=True)
assert all(torch.equal(a, b) for a, b in zip(plain, cut))
print(type(codes).__name__, tuple(codes.shape), codes.placements)
dist.destroy_process_group()
