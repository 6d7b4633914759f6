"""
Eight bits that train, and eight that do not
============================================

Adam keeps two arrays a weight, ``m`` and ``v``. Storing each in one byte instead of four is a *codec*. Which 256 values
the byte stands for decides whether training survives.
"""

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
# What it does to a step
# ----------------------
# Three optimizers, the same gradients: how far does the weight that moves most go? The states that a step uses are
# fresh, so damage shows from the second step on.

scale = 10 ** rng.uniform(-3, 0, 4096)
grads = [(rng.standard_normal(4096) * scale).astype(np.float32) for _ in range(20)]
start = np.zeros(4096, np.float32)
furthest = {}
for name, codec in [("float32", None), ("dynamic8", "dynamic8"), ("int8_linear", "int8_linear")]:
    opt = Optimizer("adamw", codecs=codec, lr=1e-3, wd=0.0)
    p, state = start, opt.init(start)
    for g in grads:
        p, state = opt.step(p, g, state)
    furthest[name] = float(np.abs(p).max())
    print(f"{name:<12} {furthest[name]:.3g}")

# %%
# Twenty steps of 0.001 should end within a few times 0.02 of the start. With a linear ``v`` they do not.

assert furthest["float32"] < 0.03
assert furthest["dynamic8"] < 0.1
assert furthest["int8_linear"] > 100 * furthest["dynamic8"]
