"""
A drop-in for torch, checked to the bit
=======================================

``AdamW8bit`` takes the place of ``torch.optim.AdamW``. Its two states take a byte a weight each, and every one of its
steps can be replayed by the reference: the same weights, the same codes, the same scales, bit for bit.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

import refopt
import refopt_cuda as rc

# %%
# Replace the import
# ------------------
# Without a GPU the same class runs on Numba kernels on the CPU.

torch.manual_seed(0)
weight = torch.nn.Parameter(torch.randn(64, 96))
opt = rc.optim.AdamW8bit([weight], lr=5e-2, weight_decay=0.01)

# %%
# The reference beside it
# -----------------------
# The same words, the same codec for both states.

ref = refopt.Optimizer("adamw", codecs="dynamic8", lr=5e-2, weight_decay=0.01)
p = weight.detach().numpy().copy()
state = ref.init(p)

# %%
# Fit a matrix, replay every step
# -------------------------------

target = torch.randn(64, 96)
for _ in range(60):
    opt.zero_grad()
    loss = (weight - target).square().mean()
    loss.backward()
    g = weight.grad.numpy().copy()
    opt.step()
    p, state = ref.step(p, g, state)
    assert np.array_equal(weight.detach().numpy().view(np.uint32), p.view(np.uint32))
print(f"loss {loss.item():.4f}; 60 of 60 steps equal, bit for bit")

# %%
# What is kept
# ------------

kept = {k: v for k, v in opt.state[weight].items() if isinstance(v, torch.Tensor) and v.numel() > 1}
for name, tensor in kept.items():
    print(f"{name:<24} {tensor.dtype!s:<14} {tuple(tensor.shape)}")
stored = sum(t.numel() * t.element_size() for t in kept.values())
print(f"{stored / weight.numel():.3f} bytes a weight; float32 states take 8")
assert stored == sum(state[0][role].nbytes for role in ("m", "v"))

# %%
# The codes of ``m``: most of them are near the middle, where the dynamic map has its levels for small values.

_, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
axis.hist(kept["m.codes"].numpy().ravel(), bins=64, range=(0, 256))
axis.set(xlabel="code of m (127 is zero)", ylabel="elements", xlim=(0, 255))
