"""What dropout has in common on every backend."""


def threshold_and_scale(p: float) -> tuple[int, float]:
    """(t, scale): an element is kept where its 32 random bits are ≥ t; integers, so no rounding can differ."""
    return min(round(p * 2**32), 2**32 - 1), 1 / (1 - p) if p < 1 else 0.0


ALPHA = 1.7580993408473766
"""−(the value that SELU's negative branch tends to)."""


def draws(p: float, alpha: bool) -> tuple[int, float, float, float]:
    """(t, scale, kept, dropped): y = x · scale + kept where the element is kept, else x · 0 + dropped."""
    threshold, scale = threshold_and_scale(p)
    if not alpha or p == 1:
        return threshold, scale, 0.0, 0.0
    scale = ((ALPHA**2 * p + 1) * (1 - p)) ** -0.5
    return threshold, scale, ALPHA * scale * p, ALPHA * scale * (p - 1)
