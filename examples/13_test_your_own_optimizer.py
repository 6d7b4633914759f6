"""
Test your own optimizer
=======================

An optimizer that is slightly wrong still trains. A loss curve does not show it; a step beside the reference does.
``refopt conform`` takes any optimizer, says which rule it follows, to how many ulps, and where it stops doing so.
"""

import matplotlib.pyplot as plt
import numpy as np
import torch

from refopt import conform

# %%
# One that is right
# -----------------
# ``torch.optim.SGD`` as ``sgd``. On the command line: ``refopt conform torch.optim:SGD --as sgd``. Levels are
# questions: L1, is each step the rule's? L2, does the error stay within its budget over thirty steps? L7, are the bytes
# those of the record?

report = conform.run("torch.optim:SGD", "sgd", only=["L1", "L2", "L7"], dtypes=["float32"])
print(report.text())
assert report.ok

# %%
# The worst errors are a few ulps of what went into a sum: torch rounds elsewhere.
#
# One that is not
# ---------------
# A class of your own, in torch's style. It has a slip that its author did not see, and with the usual betas no curve
# would show soon.


class MyAdamW(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
            for p in group["params"]:
                s = self.state[p]
                if not s:
                    s |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                s["step"] += 1
                bc1, bc2 = (1 - beta ** s["step"].item() for beta in (beta1, beta2))
                s["exp_avg"].mul_(beta1).add_(p.grad, alpha=1 - beta1)
                s["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - lr * group["weight_decay"])
                p.addcdiv_(s["exp_avg"], s["exp_avg_sq"].sqrt().add_(eps), value=-lr * bc2**0.5 / bc1)


report = conform.run(conform.TorchTarget(MyAdamW, "MyAdamW"), "adamw", only=["L1"], dtypes=["float32"])
print(report.text())
assert report.ids == {"eps-uncorrected"}

# %%
# It is recognised: ``eps`` is added before the correction of ``v``, not after it, so that at the first steps it is up
# to thirty times as large. TensorFlow's form, too; where gradients are as small as ``eps``, another optimizer.

t = np.arange(1, 3001)
_, axis = plt.subplots(figsize=(6, 2.8))
axis.semilogx(t, 1 / np.sqrt(1 - 0.999**t), label="eps before the correction")
axis.axhline(1, color="gray", linestyle="--", label="after it")
axis.set(xlabel="step", ylabel="eps, as the step feels it")
axis.legend()

# %%
# What is compared
# ----------------
# Each step starts from the reference's own weights and states, so that errors do not hide in a drift; hyper-parameters
# never lie where two rules coincide (decay is on, the betas differ); gradients span many decades and some are zero.
# :doc:`/conform` has the levels, the adapters for optimizers of any style, and the exceptions file.
