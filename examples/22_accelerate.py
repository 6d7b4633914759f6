"""
accelerate
==========

``prepare`` wraps model, optimizer and data; the optimizer inside is ours. The losses are those of the plain loop, bit
for bit.
"""

import torch
from accelerate import Accelerator

import refopt_cuda as rc
from refopt_cuda.train import data, model

# %%
# The text, batch after batch
# ---------------------------

CONTEXT, BATCH, STEPS = 64, 8, 12
text = data.standard_library().data


class Batches(torch.utils.data.IterableDataset):
    def __iter__(self):
        for step in range(STEPS):
            at = data.starts(len(text), CONTEXT, BATCH, seed=0, step=step)
            yield data.windows(text, at, CONTEXT)


# %%
# What accelerate prepares
# ------------------------

accelerator = Accelerator(cpu=True)
net = model.build(model.Sizes(layers=2, width=64, heads=2, hidden=128, context=CONTEXT), seed=0)
groups = rc.optim.groups(net, {"*norm*": {"weight_decay": 0.0}})
opt = rc.optim.AdamW8bit(groups, lr=3e-3, weight_decay=0.1)
net, opt, batches = accelerator.prepare(net, opt, torch.utils.data.DataLoader(Batches(), batch_size=None))

# %%
# The loop
# --------

losses = []
for x, y in batches:
    loss = net.loss(x, y)
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    losses.append(loss.item())

print(", ".join(f"{loss:.3f}" for loss in losses))
assert losses[-1] < losses[0]
