"""
A place changes no bit
======================

States that do not fit beside the weights can live in host memory and pass through the device page by page. That changes
which bytes move when, and nothing else.
"""

import matplotlib.pyplot as plt
import numpy as np

from refopt import Optimizer, places

# %%
# Two optimizers that differ in their place alone
# -----------------------------------------------
# A page of three blocks is absurdly small; it leaves a short last page, which is where pagers go wrong.

rng = np.random.default_rng(0)
params = {
    "embedding": rng.standard_normal((50, 48)).astype(np.float32),
    "bias": rng.standard_normal(77).astype(np.float32),
}
grads = [{k: rng.standard_normal(p.shape).astype(np.float32) for k, p in params.items()} for _ in range(5)]

resident = Optimizer("adamw", codecs="dynamic8", lr=1e-3)
paged = Optimizer("adamw", codecs="dynamic8", place=places.paged(page_blocks=3), lr=1e-3)

a, state_a = params, resident.init(params)
b, state_b = params, paged.init(params)
for g in grads:
    a, state_a = resident.step(a, g, state_a)
    b, state_b = paged.step(b, g, state_b)

# %%
# Equal weights, equal codes, equal scales
# ----------------------------------------

for name in params:
    assert np.array_equal(a[name].view(np.uint32), b[name].view(np.uint32))
for one, other in zip(state_a, state_b, strict=True):
    for role in ("m", "v"):
        assert np.array_equal(one[role].codes, other[role].codes)
        assert np.array_equal(one[role].scales.view(np.uint32), other[role].scales.view(np.uint32))

# %%
# What it costs
# -------------
# Every state byte crosses the link once in each direction, each step.

stored = sum(s[role].nbytes for s in state_b for role in ("m", "v"))
weights = sum(p.size for p in params.values())
print(f"{stored:,} state bytes for {weights:,} weights: {stored / weights:.2f} bytes a weight, moved twice a step")

# %%
# The pages of a tensor of eleven blocks, three at a time: the last one is short.

pages = list(places.paged.pages(11, 3))
print(pages)
assert pages[-1] == (9, 11)

_, axis = plt.subplots(figsize=(7, 1.6), layout="constrained")
for k, (first, last) in enumerate(pages):
    axis.barh(0, last - first, left=first, color=f"C{k}", edgecolor="white")
    axis.text((first + last) / 2, 0, f"page {k + 1}", ha="center", va="center", color="white")
axis.set(yticks=[], xticks=range(12), xlabel="block")
