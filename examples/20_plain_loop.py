"""
A training loop of torch's
==========================

The main job's transformer reads real text. Replacing the import is all that a plain loop needs; the next three examples
train the same model through other front ends, and their losses are these, to the last bit. All four keep to the CPU,
where sums have one order.
"""

import torch

import refopt_cuda as rc
from refopt_cuda.train import data, model

# %%
# The text, and the batch of each step
# ------------------------------------

CONTEXT, BATCH, STEPS = 64, 8, 12
text = data.standard_library().data


def batch(step):
    at = data.starts(len(text), CONTEXT, BATCH, seed=0, step=step)
    return data.windows(text, at, CONTEXT)


# %%
# The optimizer
# -------------
# Groups by patterns of names: norms do not decay.

net = model.build(model.Sizes(layers=2, width=64, heads=2, hidden=128, context=CONTEXT), seed=0)
groups = rc.optim.groups(net, {"*norm*": {"weight_decay": 0.0}})
opt = rc.optim.AdamW8bit(groups, lr=3e-3, weight_decay=0.1)

# %%
# The loop
# --------

losses = []
for step in range(STEPS):
    loss = net.loss(*batch(step))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    opt.step()
    opt.zero_grad()
    losses.append(loss.item())

print(", ".join(f"{loss:.3f}" for loss in losses))
assert losses[-1] < losses[0]
