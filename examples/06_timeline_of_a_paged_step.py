"""
Both directions of the link at once
===================================

States in host memory pass through three pages of device memory: one is on its way in, one is stepped, one is on its way
out. Here is when each of them was, in one step. On a GPU the marks are events in the streams that do the work; without
one the same schedule runs on the CPU, where every copy waits for the one before; :doc:`the page of the place
</places/paged>` has a step that an H100 took.

``python examples/06_timeline_of_a_paged_step.py FILE.svg`` writes the picture.
"""

import sys

import matplotlib.pyplot as plt
import torch

import refopt_cuda as rc
from refopt_cuda.places import lanes, timeline

# %%
# A few matrices and their gradients
# ----------------------------------

device = "cuda" if torch.cuda.is_available() else "cpu"
rows, page = (4096, 1 << 24) if device == "cuda" else (512, 1 << 17)
weights = [torch.nn.Parameter(torch.randn(rows, rows, device=device, dtype=torch.bfloat16)) for _ in range(4)]
for w in weights:
    w.grad = torch.full_like(w, 1e-3)

# %%
# One step, watched
# -----------------
# The first two steps make the states, the pages and the kernels.

with timeline.recorded() as watch:
    opt = rc.optim.PagedAdamW8bit(weights, lr=0.1, page_bytes=page)
    for _ in range(3):
        watch.clear()
        opt.step()
spans = watch.spans()

states = sum(x.nbytes for p in weights for x in opt.state[p].values() if torch.is_tensor(x))
moved = {lane: sum(s.bytes for s in spans if s.lane == lane) for lane in (lanes.IN, lanes.OUT)}
took = max(s.end for s in spans)
print(f"{states / 1e6:.1f} MB of states went each way in {took:.2f} ms: {states / took / 1e6:.1f} GB/s")
assert states <= moved[lanes.IN] == moved[lanes.OUT]  # gaps between arrays travel along

# %%
# What was done when
# ------------------

names = {lanes.IN: "host to device", lanes.STEP: "steps", lanes.OUT: "device to host"}
colours = {lanes.IN: "#0072b2", lanes.STEP: "#e69f00", lanes.OUT: "#009e73"}
figure, ax = plt.subplots(figsize=(9, 2.2), layout="constrained")
for row, lane in enumerate(names):
    bars = [(s.begin, s.end - s.begin) for s in spans if s.lane == lane]
    ax.broken_barh(bars, (row - 0.4, 0.8), facecolors=colours[lane], edgecolors="white", linewidth=0.2)
ax.set_yticks(range(3), list(names.values()))
ax.invert_yaxis()
ax.set_xlabel(f"milliseconds of one step ({torch.cuda.get_device_name() if device == 'cuda' else 'on the CPU'})")
ax.spines[["top", "right", "left"]].set_visible(False)
ax.tick_params(axis="y", length=0)
if len(sys.argv) == 2 and sys.argv[1].endswith(".svg"):
    figure.savefig(sys.argv[1], metadata={"Date": None})
