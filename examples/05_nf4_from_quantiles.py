"""
NF4 from normal quantiles
=========================

Frozen weights are read and never stepped, so that four bits are enough for each. Which sixteen values? Trained weights
are nearly normal: values that a normal distribution uses equally often waste none.
"""

from statistics import NormalDist

import matplotlib.pyplot as plt
import numpy as np

from refopt import codecs
from refopt.codecs.nf4 import TABLE

# %%
# Eight above, seven below, and zero
# ----------------------------------
# Zero must be a value: a weight that is padding has to stay padding. So both halves are cut for themselves, the upper
# one into eight, the lower one into seven. The last quantile of a normal distribution is infinite; how near to it the
# outermost value lies is a choice, ``offset``, half a step from the end in each half, averaged.

offset = (1 - 1 / (2 * 15) + 1 - 1 / (2 * 16)) / 2
quantile = NormalDist().inv_cdf
above = [quantile(q) for q in np.linspace(offset, 0.5, 9)[:-1]]
below = [-quantile(q) for q in np.linspace(offset, 0.5, 8)[:-1]]
values = np.sort([*above, 0.0, *below])
values /= values.max()
print(values.round(4))

# %%
# The published constants are these, but for their last bits: they were made in other arithmetic, and a checkpoint
# means the constants. The package has the constants.

print(f"farthest apart: {np.abs(values - TABLE).max():.1e}")
assert np.abs(values - TABLE).max() < 1e-6

# %%
# How often is each used?
# -----------------------
# A block of 64 weights is divided by its largest magnitude. Equally spaced values leave the outer codes idle; these are
# nearly level. The ends stand out because the largest weight of every block is one of them.

rng = np.random.default_rng(0)
w = rng.standard_normal(64 * 4096).astype(np.float32)
y = (w.reshape(-1, 64) / np.abs(w.reshape(-1, 64)).max(axis=1, keepdims=True)).ravel()
even = np.linspace(-1, 1, 16)
_, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for axis, levels, name in zip(axes, (TABLE, even), ("NF4", "equally spaced")):
    used = np.bincount(np.searchsorted((levels[:-1] + levels[1:]) / 2, y), minlength=16) / y.size
    axis.bar(range(16), used)
    axis.axhline(1 / 16, color="black", linewidth=0.8)
    axis.set(title=name, xlabel="code", ylabel="share of weights")

# %%
# What it loses
# -------------
# By the root of the mean square, NF4 is the better of the two on normal weights, and the worse one on uniform weights:
# the values fit a distribution, not all of them.

for name, x in (("normal", w), ("uniform", rng.uniform(-1, 1, w.size).astype(np.float32))):
    blocks = x.reshape(-1, 64)
    scale = np.abs(blocks).max(axis=1, keepdims=True)
    nearest = even[np.searchsorted((even[:-1] + even[1:]) / 2, (blocks / scale))] * scale
    box = codecs.nf4.encode(x)
    losses = [np.sqrt(np.mean((back - x) ** 2)) / x.std() for back in (box.decode(), nearest.ravel())]
    print(f"{name:<8} NF4 {losses[0]:.4f}   equally spaced {losses[1]:.4f}   {8 * box.nbytes / x.size:.2f} bits each")
    assert (losses[0] < losses[1]) == (name == "normal")
