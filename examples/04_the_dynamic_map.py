"""
Building the dynamic map
========================

A byte has 256 values, and it is ours to say which. Where they lie decides what a state loses: here the map of the 8-bit
optimizers is built by hand, then tested with the nearest code of a number.
"""

import matplotlib.pyplot as plt
import numpy as np

from refopt import codecs
from refopt.codecs.dynamic8 import table

# %%
# Levels by decade
# ----------------
# Seven decades below the largest value of a block. In the lowest there is one level, in each next one twice as many:
# a large value needs a small *relative* error, a small one needs above all not to become zero. A level is the middle
# of its cell; the cells of a decade are equally wide.


def positive(signed):
    levels = []
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)  # the bit of the sign is another bit of the value
        edges = np.linspace(0.1, 1, count + 1)
        levels += list((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6))
    return levels


signed = np.sort([-x for x in positive(True)] + [0.0] + positive(True) + [1.0])
unsigned = np.sort([0.0, *positive(False), 1.0])
print(len(signed), len(unsigned), signed[[0, 127, 128, -1]])

# %%
# There are 127 negative levels, zero, and 128 positive ones: no -1, so an extreme that is negative shrinks a little.
# The package computes the same numbers as exact fractions and rounds them once.

assert np.allclose(signed, table(True), rtol=1e-6)
assert np.allclose(unsigned, table(False), rtol=1e-6)

_, axes = plt.subplots(2, 1, figsize=(8, 3), sharex=True, layout="constrained")
for axis, levels, name in zip(axes, (unsigned, np.linspace(0, 1, 256)), ("dynamic, unsigned", "linear")):
    axis.vlines(levels[levels > 0], 0, 1, linewidth=0.6)
    axis.set(xscale="log", xlim=(1e-7, 1.2), yticks=[], title=name)
axes[1].set_xlabel("value, as a share of the largest of the block")

# %%
# The nearest code
# ----------------
# A block of 256 elements shares one float32, its largest magnitude. An element over that scale lies between two levels;
# the nearer one is found by counting the midpoints below it. At a tie, the smaller magnitude is taken.

mids = (table(True)[:-1] + table(True)[1:]) * np.float32(0.5)


def encode(block):
    scale = np.abs(block).max()
    y = block * (np.float32(1) / scale)
    above, below = np.searchsorted(mids, y, "left"), np.searchsorted(mids, y, "right")
    return np.where(y > 0, above, below).astype(np.uint8), scale


rng = np.random.default_rng(0)
x = (rng.standard_normal(256) * 10 ** rng.uniform(-4, 0, 256)).astype(np.float32)
codes, scale = encode(x)
box = codecs.dynamic8.encode(x)
assert np.array_equal(codes, box.codes) and scale == box.scales[0]

# %%
# What a value loses
# ------------------
# The error is a few per cent of the largest values and grows as there are fewer levels, but even the lowest decade is
# not lost. Evenly spaced levels are better near 1 and nothing at all further down.

size = 10 ** np.linspace(-8, 0, 2000).astype(np.float32)
_, axis = plt.subplots(figsize=(7, 3.5))
for codec in (codecs.dynamic8(signed=False), codecs.int8_linear(signed=False)):
    errors = []
    for value in size:
        back = codec.decode(codec.encode(np.float32([1, value])))[1]
        errors.append(abs(back - value) / value)
    axis.loglog(size, np.maximum(errors, 1e-4), label=codec.stem, linewidth=0.8)
axis.set(xlabel="value, as a share of the largest", ylabel="relative error", ylim=(1e-4, 3))
axis.legend()
