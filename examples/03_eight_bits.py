"""
Eight bits that train, and eight that do not
============================================

Adam keeps two arrays a weight, ``m`` and ``v``. Storing each in one byte instead of four is a *codec*. Which 256 values
the byte stands for decides whether training survives.
"""

import matplotlib.pyplot as plt
import numpy as np

from refopt import Optimizer, codecs

# %%
# One block of ``v``
# ------------------
# Squared gradients span many decades inside one block of 256, which shares one scale.

rng = np.random.default_rng(0)
v = (10 ** rng.uniform(-6, 0, 256)).astype(np.float32)
linear = codecs.int8_linear(signed=False)
dynamic = codecs.dynamic8(signed=False)

for codec in (linear, dynamic):
    box = codec.encode(v)
    zeros = int((codec.decode(box) == 0).sum())
    print(f"{codec.stem:<12} {box.nbytes} bytes for {v.nbytes}; {zeros} of 256 values became zero")

# %%
# Evenly spaced levels turn half of the block into zeros. Adam divides by the root of ``v``: weights whose ``v`` became
# zero are thrown far away. The dynamic map spends its levels by decade and keeps them all.

lost = int((linear.decode(linear.encode(v)) == 0).sum())
kept = dynamic.decode(dynamic.encode(v))
assert lost > 64
assert (kept > 0).all()

# %%
# What is left of each value
# --------------------------
# A value is good as long as it lies near the diagonal. Below half of a level, the linear map has only zero to offer
# (drawn at the bottom).

_, axis = plt.subplots(figsize=(6, 4))
axis.loglog(v, v, color="lightgray", label="exact")
for codec, mark in ((linear, "x"), (dynamic, ".")):
    axis.loglog(v, np.maximum(codec.decode(codec.encode(v)), 3e-7), mark, label=codec.stem)
axis.set(xlabel="v", ylabel="v after one byte", title="One block of a second moment")
axis.legend()

# %%
# What it does to a step
# ----------------------
# Three optimizers, the same gradients: how far does the weight that moves most go? The states that a step uses are
# fresh, so damage shows from the second step on.

scale = 10 ** rng.uniform(-3, 0, 4096)
grads = [(rng.standard_normal(4096) * scale).astype(np.float32) for _ in range(20)]
start = np.zeros(4096, np.float32)
furthest, paths = {}, {}
for name, codec in [("float32", None), ("dynamic8", "dynamic8"), ("int8_linear", "int8_linear")]:
    opt = Optimizer("adamw", codecs=codec, lr=1e-3, wd=0.0)
    p, state = start, opt.init(start)
    paths[name] = []
    for g in grads:
        p, state = opt.step(p, g, state)
        paths[name].append(float(np.abs(p).max()))
    furthest[name] = paths[name][-1]
    print(f"{name:<12} {furthest[name]:.3g}")

# %%
# Twenty steps of 0.001 should end within a few times 0.02 of the start. With a linear ``v`` they do not.

assert furthest["float32"] < 0.03
assert furthest["dynamic8"] < 0.1
assert furthest["int8_linear"] > 100 * furthest["dynamic8"]

# %%
# The damage is there at the second step, long before a loss would show what it was.

_, axis = plt.subplots(figsize=(6, 3.5))
for name, path in paths.items():
    axis.semilogy(range(1, 21), path, label=name, linestyle="--" if name == "dynamic8" else "-")
axis.set(xlabel="step", ylabel="farthest weight", xticks=(1, 5, 10, 15, 20))
axis.legend()
