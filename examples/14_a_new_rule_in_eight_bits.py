"""
The last exercise: a new rule in eight bits
===========================================

Everything comes together: a rule, a codec, and the suite that judges. The rule is AdEMAMix, which none of these pages
has computed; its three states shall take a byte each. You write it, and ``refopt conform`` says whether it is right.

The rule
--------
A gradient of ten thousand steps ago still helps. AdEMAMix (Pagliardini et al., arXiv 2409.03137) has a fast mean, a
slow one, and steps along both::

    m1 <- beta1 m1 + (1 - beta1) g
    m2 <- beta3 m2 + (1 - beta3) g
    v  <- beta2 v + (1 - beta2) g^2
    u   = (m1 / (1 - beta1^t) + alpha m2) / (sqrt(v / (1 - beta2^t)) + eps)
    p  <- p (1 - lr wd) - lr u

``m2`` is on purpose not corrected. The step uses the fresh states; they are encoded after it.

The task
--------
``examples/exercise/my_rule.py`` has three functions to fill in: ``encode``, ``decode`` and ``update``. Blocks are 256
elements of the flat tensor, the last one short; ``v`` has the unsigned map. Then, in that folder::

    refopt conform my_rule:target --as ademamix

It asks what you were not told: tails, blocks of zeros, NaN, gradients of 1e-30, whether each code is the nearest,
whether you write into what you are given, whether a saved run goes on alike. You are done when nothing fails.
"""

import sys
from pathlib import Path

import numpy as np

from refopt import conform

# %%
# What an answer looks like to the suite
# --------------------------------------
# There is a solution beside the exercise; its report is this.

folder = next(f for f in (Path("exercise"), Path("examples/exercise"), Path("../examples/exercise")) if f.is_dir())
sys.path.insert(0, str(folder))
import solution
from frame import EightBit

report = conform.run(solution.target, "ademamix")
print(report.text())
assert report.ok

# %%
# ``skip`` is what cannot be asked: this function takes no ramps, and its states have one place.
#
# What a slip looks like
# ----------------------
# Three that have been made before: codes that are rounded down instead of to the nearest; ``m2`` corrected like ``m1``;
# the scale of the whole tensor in place of each block's. All of them train.


def rounded_down(x, signed):
    codes, scales = right(x, signed)
    back = solution.decode(codes, scales, signed, x.shape).ravel()
    over = np.abs(back) > np.abs(x.ravel())
    return (codes - np.where(over, np.sign(back), 0)).astype(np.uint8), scales


def corrected(p, g, state, *, t, lr, beta1, beta2, beta3, alpha, eps, wd):
    alpha = alpha / (1 - beta3**t)
    return solution.update(p, g, state, t=t, lr=lr, beta1=beta1, beta2=beta2, beta3=beta3, alpha=alpha, eps=eps, wd=wd)


def one_scale(x, signed):
    codes, scales = right(x, signed)
    return codes, np.full_like(scales, scales.max(initial=0))


right = solution.encode
for name, encode, update in (
    ("rounded down", rounded_down, solution.update),
    ("m2 corrected", right, corrected),
    ("one scale", one_scale, solution.update),
):
    solution.encode = encode
    report = conform.run(EightBit(solution.init, update, name), "ademamix", only=["L1", "L3"])
    solution.encode = right
    for finding in (f for f in report.findings if f.status == "fail"):
        print(f"{name}: {finding.level} {finding.id}\n    {finding.text}\n")
    assert not report.ok
