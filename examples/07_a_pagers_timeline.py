"""
A pager's timeline
==================

Paged states cross the link between host and device twice a step. Done one after the other, copies and steps wait for
each other; done by a pager, they overlap. The place's record says what moves; a few lines say when.
"""

import matplotlib.pyplot as plt
import numpy as np

from refopt import Optimizer, places

# %%
# What moves
# ----------
# A schedule is known before anything is allocated: the states of every page to the device, and back when the page is
# stepped. Here AdamW's two 8-bit states over a small tensor, cut into pages of 64 blocks.

opt = Optimizer("adamw", "dynamic8", place=places.paged(page_blocks=64, buffers=3))
p = np.zeros(200_000, np.float32)
moves = list(opt.schedule(p))
for move in moves[:4]:
    print(*move)

pages = []
for move in moves:
    if move.way == "host>device" and (not pages or pages[-1]["out"]):
        pages.append({"in": 0, "out": 0})
    pages[-1]["in" if move.way == "host>device" else "out"] += move.bytes
print(f"{len(pages)} pages, {sum(page['in'] for page in pages):,} bytes each way")

# %%
# When it moves
# -------------
# Three lanes, each of which does one thing at a time: copies in, steps, copies out. A page is loaded when its place in
# the ring is free, stepped when it is loaded, stored when it is stepped. Nothing else waits. The units are made up: a
# copy takes as long as its bytes, a step a fifth of that.


def timeline(buffers):
    rows, free, ends = [], [0.0] * buffers, {"copy in": 0.0, "step": 0.0, "copy out": 0.0}
    for k, page in enumerate(pages):
        ready = free[k % buffers]
        for lane, length in (("copy in", page["in"]), ("step", page["in"] / 5), ("copy out", page["out"])):
            start = max(ready, ends[lane])
            ready = ends[lane] = start + length
            rows.append((lane, k, start, length))
        free[k % buffers] = ready
    return rows, max(ends.values())


_, axes = plt.subplots(3, 1, figsize=(9, 5), sharex=True, layout="constrained")
took = {}
for axis, buffers in zip(axes, (1, 2, 3)):
    rows, took[buffers] = timeline(buffers)
    for lane, k, start, length in rows:
        height = ("copy out", "step", "copy in").index(lane)
        axis.barh(height, length, left=start, color=f"C{k % buffers}", edgecolor="white")
        if lane != "step":
            axis.text(start + length / 2, height, str(k + 1), ha="center", va="center", fontsize=7)
    axis.set(yticks=(0, 1, 2), yticklabels=("copy out", "step", "copy in"), title=f"{buffers} page(s) on the device")
axes[-1].set(xlabel="time; a colour is a place in the ring, a number a page", xticks=[])

# %%
# Two directions at once
# ----------------------
# The link carries both directions at the same time. With three pages one is on its way in, one is stepped, one is on
# its way out, and the whole takes as long as one direction and the last page: no fourth page makes it faster. What a
# real link gives is measured (:doc:`/bench/index`).

one_way = sum(page["in"] for page in pages)
for buffers, time in took.items():
    print(f"{buffers} page(s): {time / one_way:.2f} times the bytes of one direction")
assert took[1] > 1.9 * one_way
assert took[3] < 1.25 * one_way
assert timeline(4)[1] == took[3]

# %%
# What the device holds
# ---------------------
# Weights, gradients and the ring, whatever the states take. That is the price: each buffer is a page of memory.

for buffers in (2, 3):
    peak = Optimizer("adamw", "dynamic8", place=places.paged(page_blocks=64, buffers=buffers)).peak(p)
    print(f"{buffers} pages: device {peak.device:,}, host {peak.host:,} bytes")
