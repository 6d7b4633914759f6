"""
Lion by hand
============

An optimizer is a few equations between two lines of bookkeeping. Here are Lion's, computed by hand, and then the same
numbers from the package. NumPy is all that is needed.
"""

import numpy as np

import refopt
from refopt import rules

f32 = np.float32

# %%
# A weight, a gradient, a state
# -----------------------------
# Lion keeps one array a weight, the momentum ``m``, which begins at zero.

p = np.array([1.0, -2.0, 0.5], f32)
g = np.array([0.5, 0.25, -0.125], f32)
state = rules.lion.init(p)
print(state)

# %%
# Two steps by hand
# -----------------
# Every weight moves by exactly ``lr``; only the direction comes from the gradients. The step looks at ``beta1`` of the
# old momentum, the state keeps ``beta2`` of it. Swap the two and it still converges, which is how such a slip survives.

lr, beta1, beta2, wd = 0.1, 0.9, 0.99, 0.1
decay, omb1, omb2 = f32(1 - lr * wd), f32(1 - beta1), f32(1 - beta2)
by_hand, m = p, np.zeros_like(p)
for gradient in (g, f32(-0.08) * g):
    by_hand = by_hand * decay
    c = f32(beta1) * m + omb1 * gradient
    by_hand = by_hand - f32(lr) * np.sign(c)
    m = f32(beta2) * m + omb2 * gradient
print(by_hand, m)

# %%
# The same from the package
# -------------------------
# ``update`` is a pure function: nothing that goes in is changed. The bits are those computed by hand.

new_p, new_state = p, state
for t, gradient in enumerate((g, f32(-0.08) * g), start=1):
    new_p, new_state = rules.lion.update(new_p, gradient, new_state, t=t, lr=lr, beta1=beta1, beta2=beta2, wd=wd)
assert np.array_equal(new_p, by_hand)
assert np.array_equal(new_state["m"], m)
print(new_p, new_state["m"])

# %%
# One equation at a time
# ----------------------
# ``trace`` takes the step that an optimizer takes, and stops after every line of the rule.

opt = refopt.Optimizer("lion", lr=lr, wd=wd)
for line in refopt.trace(opt, p, g, opt.init(p)):
    if not isinstance(line.value, dict):
        print(f"{line.name:>6} = {np.array2string(np.asarray(line.value), precision=5):<32} {line.equation}")
