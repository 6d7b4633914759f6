"""Your turn: AdEMAMix with its three states in 8 bits. The equations are in examples/14_a_new_rule_in_eight_bits.py.

Fill in the three functions, then, in this folder:

    refopt conform my_rule:target --as ademamix
"""

import numpy as np
from frame import EightBit

from refopt.codecs.dynamic8 import table

f32 = np.float32


def encode(x, signed):
    """(codes, scales) of a float32 array: flat, in blocks of 256, the last one short; codes index `table(signed)`."""
    raise NotImplementedError("encode: the largest magnitude of each block, then the nearest code of each element")


def decode(codes, scales, signed, shape):
    """The float32 array of this shape that they stand for."""
    raise NotImplementedError("decode: the value of each code times the scale of its block")


def init(p):
    """Three states of zeros."""
    state = {}
    for name in ("m1", "m2", "v"):
        state[f"{name}.codes"], state[f"{name}.scales"] = encode(np.zeros_like(p), name != "v")
    return state


def update(p, g, state, *, t, lr, beta1, beta2, beta3, alpha, eps, wd):
    """One step: (p, state), both new."""
    raise NotImplementedError("update: decode, the equations, encode")


target = EightBit(init, update, "my AdEMAMix in 8 bits")
