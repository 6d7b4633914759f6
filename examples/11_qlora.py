"""
QLoRA: train beside frozen weights
==================================

Fine-tuning moves a model by little: two thin matrices beside each weight matrix are enough to say by how much. The
weights themselves are only read, and four bits are enough for that.
"""

import matplotlib.pyplot as plt
import torch

import refopt_cuda as rc
from refopt_cuda import nn
from refopt_cuda.train import data, model

# %%
# A model that has learnt something
# ---------------------------------
# Python's sources, first. What it shall be tuned to is the prose of Python's manual, the first half million bytes.

torch.set_num_threads(1)  # so small a model is slower on more
CONTEXT, BATCH = 64, 8
text = data.standard_library().data
prose, sources = text[:500_000], text[1_000_000:]
net = model.build(model.Sizes(layers=2, width=64, heads=2, hidden=128, context=CONTEXT), seed=0)


def batch(of, step, seed=0):
    return data.windows(of, data.starts(len(of), CONTEXT, BATCH, seed=seed, step=step), CONTEXT)


def train(of, opt, steps):
    for step in steps:
        net.loss(*batch(of, step)).backward()
        opt.step()
        opt.zero_grad()


@torch.no_grad()
def held_out():
    return sum(net.loss(*batch(prose, step, seed=1)).item() for step in range(6)) / 6


train(sources, rc.optim.AdamW(net.parameters(), lr=3e-3), range(60))
before = held_out()

# %%
# Freeze it, in four bits
# -----------------------
# ``prepare`` swaps every linear layer for one whose weights are NF4 codes and coded scales. The loss says what that
# cost. The table that is embedding and output at once stays as it is.

nn.prepare(net, compute_dtype=torch.float32, skip=("output",))
frozen = held_out()
layers = [m for m in net.modules() if isinstance(m, nn.Linear4bit)]
print(f"{len(layers)} layers; prose, loss {before:.3f} in float32, {frozen:.3f} in 4 bits")

# %%
# Two thin matrices
# -----------------
# ``adapt`` puts A (rank 8, in) and B (out, rank 8) around each. B is zero, so the model is still what it was. Only they
# have gradients, and so only they have states.

nn.adapt(net, r=8, alpha=16)
assert abs(held_out() - frozen) < 1e-4
trained = [p for p in net.parameters() if p.requires_grad]
print(f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in net.parameters()):,} parameters train")

codes = [layer.weight.detach().clone() for layer in layers]
opt, course = rc.optim.AdamW(trained, lr=1e-2), [frozen]
for first in range(0, 40, 10):
    train(prose, opt, range(first, first + 10))
    course.append(held_out())
print(f"prose, loss {course[-1]:.3f} after 40 steps of the adapters")
assert course[-1] < frozen - 0.1
assert all(torch.equal(layer.weight, kept) for layer, kept in zip(layers, codes))  # nothing else has moved

_, axis = plt.subplots(figsize=(7, 3.2))
axis.plot(range(0, 41, 10), course, marker="o", label="with adapters")
axis.axhline(frozen, color="gray", linestyle="--", label="the frozen model")
axis.set(xlabel="step", ylabel="loss on prose, nats a byte")
axis.legend()

# %%
# And back to plain weights
# -------------------------
# ``merge`` adds B A to what the codes stand for. Coding the sum anew would lose part of what was learnt.

nn.merge(net)
assert abs(held_out() - course[-1]) < 1e-3
