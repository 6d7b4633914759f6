"""What the exercise is judged through: states that are codes and scales, shown to the suite. Nothing to do here."""

from refopt.codecs.dynamic8 import table
from refopt.conform import Coded, FunctionalTarget
from refopt.conform.target import decoded

BLOCK = 256


class EightBit(FunctionalTarget):
    """`init` and `update` over a flat dict: NAME.codes, uint8, one an element; NAME.scales, float32, one a block.

    A state named v is never negative and has the unsigned map, the others the signed one.
    """

    def coded(self, k):
        kept = self.states[k]
        names = [name.removesuffix(".codes") for name in kept if name.endswith(".codes")]
        return {n: Coded(kept[f"{n}.codes"], kept[f"{n}.scales"], table(n != "v"), BLOCK) for n in names}

    def state(self, k):
        return {n: decoded(c).reshape(self.ps[k].shape) for n, c in self.coded(k).items()}

    def force(self, k, p, state, t):
        return False  # codes cannot be made to hold the reference's numbers; each step starts from what they decode to

    def nbytes(self, k):
        return sum(x.nbytes for x in self.states[k].values())
