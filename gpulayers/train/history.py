"""What happened in training, epoch by epoch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from gpulayers._table import table


class History(dict[str, list[float]]):
    """{"loss": [one number an epoch], "accuracy": …, "val_loss": …}; a dict that prints and plots itself."""

    @property
    def epochs(self) -> int:
        return max((len(v) for v in self.values()), default=0)

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.setdefault(name, []).append(float(value))

    def best(self, name: str = "val_loss") -> int:
        """The epoch (from 0) in which ``name`` was best: largest for an accuracy, smallest for anything else.

        NaN is never best, unless there is nothing else.
        """
        sign = -1 if "accuracy" in name else 1
        return min(range(len(self[name])), key=lambda i: (math.isnan(self[name][i]), sign * self[name][i]))

    def __str__(self) -> str:
        names = list(self)
        return table(
            ["epoch", *names],
            [[i + 1, *(f"{self[n][i]:.4g}" if i < len(self[n]) else "" for n in names)] for i in range(self.epochs)],
        )

    def save(self, path: str | os.PathLike) -> None:
        with open(path, "w") as file:
            json.dump(dict(self), file, indent=1)

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """A figure with the losses and, beside them, the metrics; written to ``path`` (PNG, SVG, …) if one is given.

        Needs matplotlib (``pip install gpulayers[demo]``). Returns the figure.
        """
        from matplotlib.figure import Figure

        shown = [n for n in self if not n.startswith("val_") and n not in ("lr", "seconds")]
        figure = Figure(figsize=(5 * max(1, len(shown)), 3.6), layout="constrained")
        epochs = range(1, self.epochs + 1)
        for axes, name in zip(figure.subplots(1, max(1, len(shown)), squeeze=False)[0], shown):
            axes.plot(epochs, self[name], label="training")
            if f"val_{name}" in self:
                axes.plot(epochs, self[f"val_{name}"], label="held out")
            axes.set(title=name, xlabel="epoch")
            axes.grid(alpha=0.3)
            axes.legend()
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure
