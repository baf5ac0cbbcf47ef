"""What dropout has in common on every backend."""


def threshold_and_scale(p: float) -> tuple[int, float]:
    """(t, scale): an element is kept where its 32 random bits are ≥ t; integers, so no rounding can differ."""
    return min(round(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0
