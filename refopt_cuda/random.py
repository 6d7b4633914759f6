"""placeholder"""

GOLDEN, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1


def _mix(z: int) -> int:
    z = (z + GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def step_word(seed: int, step: int) -> int:
    return _mix(seed ^ (step * GOLDEN & MASK))
