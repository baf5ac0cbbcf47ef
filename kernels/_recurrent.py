"""What all backends know of recurrent layers."""

from __future__ import annotations

from collections.abc import Iterator

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
"""How many rows of the weights a hidden unit has, by mode."""


def walk(steps: int, reverse: bool) -> Iterator[tuple[int, int | None]]:
    """(step, the one computed before it, None for the first) in the order in which they are computed."""
    for i in range(steps):
        t = steps - 1 - i if reverse else i
        yield t, (None if i == 0 else t + 1 if reverse else t - 1)
