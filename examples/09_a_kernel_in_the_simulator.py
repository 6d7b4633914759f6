"""
A kernel, and a breakpoint in it
================================

A rule is written for one element, and a kernel runs it for all of them. Numba compiles such a kernel for a GPU; its
CUDA simulator runs the same source as plain Python, where a debugger can stop it.
"""

# %%
# The simulator is chosen before Numba is first imported, for the whole process. (On a GPU, leave these lines out.)

import os

os.environ["NUMBA_ENABLE_CUDASIM"] = "1"

import matplotlib.pyplot as plt
import numpy as np
from numba import cuda

import refopt

# %%
# One element, one thread
# -----------------------
# Signum: the momentum moves, the weight steps along its sign. A thread takes the element of its number; those beyond
# the end do nothing: forget that line, and they write into somebody's memory.


@cuda.jit
def signum(p, g, m, lr, beta, omb, seen):
    i = cuda.grid(1)
    if i < p.size:
        m[i] = beta * m[i] + omb * g[i]
        p[i] = p[i] - lr * (np.float32(m[i] > 0) - np.float32(m[i] < 0))
        if i == 100:  # breakpoint() here stops in this thread; we take notes instead
            seen[0], seen[1], seen[2] = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x


rng = np.random.default_rng(0)
p, g = rng.standard_normal((2, 150)).astype(np.float32)
new, m, seen = p.copy(), np.zeros_like(p), np.zeros(3, np.int64)
signum[5, 32](new, g, m, *np.float32([0.1, 0.9, 1 - 0.9]), seen)
print("element 100 was block {}, thread {} of {}".format(*seen))

# %%
# Bit for bit
# -----------
# Scalars are float32 and computed outside: a bare ``0.9`` in the kernel would make it compute in float64. The simulator
# gives the bits of the reference; a GPU, which fuses ``a * b + c`` into one rounding, would not. The package's kernels
# are written over ``mul`` and ``add``, which it may not fuse (:doc:`/numerics`).

want, state = refopt.rules.signum.update(p, g, {"m": np.zeros_like(p)}, t=1, lr=0.1, beta=0.9)
assert np.array_equal(new, want) and np.array_equal(m, state["m"])

# %%
# A block that works together
# ---------------------------
# For 8-bit states the threads of a block need their largest magnitude: each leaves its own in shared memory, then half
# of them fold the other half in, until one is left. Between rounds all wait: a missing barrier is the classic bug.


@cuda.jit
def largest(x, out, rounds):
    row = cuda.shared.array(32, np.float32)
    i, lane = cuda.grid(1), cuda.threadIdx.x
    row[lane] = abs(x[i]) if i < x.size else np.float32(0)
    half, number = 16, 0
    while half:
        cuda.syncthreads()
        rounds[number, i] = row[lane]  # only to be drawn
        if lane < half:
            row[lane] = max(row[lane], row[lane + half])
        half, number = half // 2, number + 1
    if lane == 0:
        out[cuda.blockIdx.x] = row[0]


scales, rounds = np.zeros(5, np.float32), np.zeros((5, 160), np.float32)
largest[5, 32](m, scales, rounds)
assert np.array_equal(scales, refopt.codecs.dynamic8.encode(m, block=32).scales)

_, axis = plt.subplots(figsize=(8, 2.2))
live = np.where(np.arange(32) < 32 >> np.arange(5)[:, None], rounds[:, :32], np.nan)
axis.imshow(live, aspect="auto", cmap="viridis")
axis.set(xlabel="thread of block 0", ylabel="round", yticks=range(5), title="What the threads at work hold")

# %%
# The package's own
# -----------------
# ``refopt_cuda/kernels/step_numba.py`` is these two kernels together, for every rule and codec, and runs here, too. Put
# ``breakpoint()`` into the step of ``refopt_cuda/rules/lion.py``, and this command stops in it; without, it says that
# weights, codes and scales are the reference's::
#
#     python -m tests.twins.check lion --codec dynamic8 --block 64 --on simulator
