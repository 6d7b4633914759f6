"""
AdamW, beside torch's
=====================

The reference is right by definition only if it is right. An independent implementation says so: ``torch.optim.AdamW``,
over fifty steps. The two associate their products differently, so they agree to rounding and not to the bit.
"""

import numpy as np
import torch

import refopt

# %%
# The same weights, the same gradients
# ------------------------------------
# Gradient sizes span four decades: at one size, an ``eps`` in the wrong place cannot be seen.

rng = np.random.default_rng(0)
p = rng.standard_normal(1000).astype(np.float32)
grads = [(rng.standard_normal(1000) * 10 ** rng.uniform(-4, 0)).astype(np.float32) for _ in range(50)]

# %%
# Torch's words are understood, so one dictionary serves both.

words = {"lr": 1e-3, "betas": (0.8, 0.97), "eps": 1e-7, "weight_decay": 0.1}

weight = torch.nn.Parameter(torch.from_numpy(p.copy()))
theirs = torch.optim.AdamW([weight], **words)
for g in grads:
    weight.grad = torch.from_numpy(g)
    theirs.step()

ours = refopt.Optimizer("adamw", **words)
mine, state = p, ours.init(p)
for g in grads:
    mine, state = ours.step(mine, g, state)

# %%
# How far apart are they?
# -----------------------
# Each of fifty steps rounds a few times, at 6e-8 of the weight: 2e-6 of the largest weight is room enough for that and
# for nothing else. Forget the decay and the difference is a thousand times that.

want = weight.detach().numpy()
apart = np.abs(mine - want).max() / np.abs(want).max()
forgetful = refopt.Optimizer("adamw", **(words | {"weight_decay": 0.0}))
wrong, state = p, forgetful.init(p)
for g in grads:
    wrong, state = forgetful.step(wrong, g, state)
visible = np.abs(wrong - want).max() / np.abs(want).max()
print(f"apart {apart:.1e}; without the decay {visible:.1e}")
assert apart < 2e-6 < 1e-3 < visible
