"""
Paged 8-bit states on a real model
==================================

A small transformer reads real text, twice: once with AdamW as everybody knows it, once with its two states in 8 bits
and in host memory. The loss can hardly tell them apart; the bytes can.
"""

import matplotlib.pyplot as plt
import torch

import refopt
import refopt_cuda as rc
from refopt_cuda.train import data, model

# %%
# One model, one text, two optimizers
# -----------------------------------
# The same first weights, the same batches. ``min_8bit_size`` is lowered because this model is small: tensors of fewer
# elements than that keep float32 states, 4,096 unless told otherwise. Without a GPU "paged" means the same pages
# through the same ring, copied by a thread.

torch.set_num_threads(1)  # so small a model is slower on more
CONTEXT, BATCH, STEPS = 64, 8, 40
text = data.standard_library().data
sizes = model.Sizes(layers=2, width=64, heads=2, hidden=128, context=CONTEXT)
optimizers = {
    "AdamW": lambda weights: rc.optim.AdamW(weights, lr=3e-3),
    "AdamW8bit": lambda weights: rc.optim.AdamW8bit(weights, lr=3e-3, min_8bit_size=1024),
    "PagedAdamW8bit": lambda weights: rc.optim.PagedAdamW8bit(weights, lr=3e-3, min_8bit_size=1024),
}


def trained(make):
    net = model.build(sizes, seed=0)
    opt, losses = make(net.parameters()), []
    for step in range(STEPS):
        x, y = data.windows(text, data.starts(len(text), CONTEXT, BATCH, seed=0, step=step), CONTEXT)
        loss = net.loss(x, y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return net, opt, losses


runs = {name: trained(make) for name, make in optimizers.items()}

# %%
# The losses
# ----------

_, axis = plt.subplots(figsize=(7, 3.5))
for (name, (_, _, losses)), line in zip(runs.items(), ("-", "-", "--")):
    axis.plot(losses, line, label=f"{name}, {losses[-1]:.3f}")
axis.set(xlabel="step", ylabel="loss, nats a byte")
axis.legend()

# %%
# Paging changes no bit: the weights after these steps are those of the resident 8-bit run.

for one, other in zip(runs["AdamW8bit"][0].parameters(), runs["PagedAdamW8bit"][0].parameters()):
    assert torch.equal(one, other)
assert abs(runs["AdamW"][2][-1] - runs["PagedAdamW8bit"][2][-1]) < 0.05

# %%
# The bytes
# ---------

for name, (net, opt, _) in runs.items():
    kept = [x for p in net.parameters() for x in opt.state[p].values() if isinstance(x, torch.Tensor) and x.numel() > 1]
    weights = sum(p.numel() for p in net.parameters())
    print(f"{name:<15} {sum(x.numel() * x.element_size() for x in kept) / weights:.2f} bytes of state a weight")

# %%
# At the size that makes it worth while
# -------------------------------------
# The same arithmetic for Llama-2-7B, before anything is allocated: bfloat16 weights and gradients, and the states.

llama = refopt.models.named("llama-2-7b")
for name, codecs, place in (
    ("AdamW", {"p": "bf16"}, "resident"),
    ("AdamW8bit", {"p": "bf16", "m": "dynamic8", "v": "dynamic8"}, "resident"),
    ("PagedAdamW8bit", {"p": "bf16", "m": "dynamic8", "v": "dynamic8"}, "paged"),
):
    opt = refopt.Optimizer("adamw", codecs, place)
    print(name, refopt.memory.train(llama, opt, batch=1, sequence=2048, checkpoint=True), sep="\n", end="\n\n")
