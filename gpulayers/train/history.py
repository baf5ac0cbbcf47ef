"""What happened in training, epoch by epoch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

from gpulayers._table import table
from gpulayers.train.metrics import RESERVED, mode


class History(dict[str, list[float]]):
    """{"loss": [one number an epoch], "accuracy": …, "val_loss": …}; a dict that prints and plots itself.

    A value that an epoch does not have (of a metric that was asked for later) is NaN.
    """

    @property
    def epochs(self) -> int:
        return max((len(v) for v in self.values()), default=0)

    def add(self, values: Mapping[str, float]) -> None:
        """The values of another epoch."""
        before = self.epochs
        for name in dict.fromkeys([*self, *values]):
            column = self.setdefault(name, [])
            column += [math.nan] * (before - len(column))
            column.append(float(values.get(name, math.nan)))

    def best(self, name: str = "val_loss", better: str | None = None) -> int:
        """The epoch (from 0) in which ``name`` was best.

        better: "min" or "max"; None: as the name says (losses and errors fall, accuracies rise), ValueError if it does
        not. NaN is never best, unless there is nothing else.
        """
        sign = 1 if mode(name, better) == "min" else -1
        return min(range(len(self[name])), key=lambda i: (math.isnan(self[name][i]), sign * self[name][i]))

    def __str__(self) -> str:
        names = list(self)
        return table(
            ["epoch", *names],
            [[i + 1, *(f"{self[n][i]:.4g}" if i < len(self[n]) else "" for n in names)] for i in range(self.epochs)],
        )

    def save(self, path: str | os.PathLike) -> None:
        """As JSON, which has no NaN and no infinity: they are null."""
        finite = {name: [v if math.isfinite(v) else None for v in column] for name, column in self.items()}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(finite, file, indent=1)

    def plot(self, path: str | os.PathLike | None = None) -> Any:
        """A figure with the losses and, beside them, the metrics; written to ``path`` (PNG, SVG, …) if one is given.

        Needs matplotlib (``pip install gpulayers[demo]``). Returns the figure.
        """
        from matplotlib.figure import Figure

        shown = list(dict.fromkeys(n.removeprefix("val_") for n in self if n not in RESERVED[1:]))
        figure = Figure(figsize=(5 * max(1, len(shown)), 3.6), layout="constrained")
        for axes, name in zip(figure.subplots(1, max(1, len(shown)), squeeze=False)[0], shown):
            for column, label in ((name, "training"), (f"val_{name}", "held out")):
                if column in self:
                    axes.plot(range(1, len(self[column]) + 1), self[column], label=label)
            axes.set(title=name, xlabel="epoch")
            axes.grid(alpha=0.3)
            axes.legend()
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure

    def plot_if_possible(self, path: str | os.PathLike) -> str | None:
        """``plot(path)``; gives the path, or None where matplotlib is not installed."""
        try:
            self.plot(path)
        except ImportError:
            return None
        return os.fspath(path)
