"""What of torch.nn is served, counted from the classes and functions themselves."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
import torch.nn.functional as F

from gpulayers._table import table

KERNELS, AS_IS, LEFT = "kernels", "view, container or helper", "left to torch"
STATES = (KERNELS, AS_IS, LEFT)
_AS_IS = {
    *(
        "Buffer",
        "Container",
        "DataParallel",
        "Identity",
        "LinearCrossEntropyOptions",
        "Module",
        "ModuleDict",
        "ModuleList",
    ),
    *("Parameter", "ParameterDict", "ParameterList", "RNNBase", "RNNCellBase", "Sequential", "Unflatten"),
    *("UninitializedBuffer", "UninitializedParameter", "Flatten"),
    *("assert_int_or_pair", "boolean_dispatch", "handle_torch_function", "has_torch_function"),
    *("has_torch_function_unary", "has_torch_function_variadic"),
}
"""Names that compute nothing."""
_WHY = {
    "CrossMapLRN2d": "torch's counts the first channel in all later sums; LocalResponseNorm, which it became, does not",
    "grouped_mm": "products whose sizes the device alone knows",
    "scaled_mm": "float8 matrices",
    "scaled_grouped_mm": "float8 matrices",
}


@dataclass(frozen=True)
class Coverage:
    """Which name of torch.nn, and of torch.nn.functional, is served how; print it for a table."""

    classes: dict[str, str]
    functions: dict[str, str]

    def __str__(self) -> str:
        rows = []
        for where, names in (("torch.nn", self.classes), ("torch.nn.functional", self.functions)):
            count = Counter(names.values())
            rows.append((where, str(len(names)), *(str(count[state]) for state in STATES)))
        left = [
            f"{n}: {_WHY.get(n, 'no kernel')}"
            for names in (self.classes, self.functions)
            for n in names
            if names[n] == LEFT
        ]
        return "\n".join([table(("of", "names", *STATES), rows), "", "left to torch:", *left])


def coverage() -> Coverage:
    """The state of each class of ``torch.nn`` and of each function of ``torch.nn.functional``: kernels (a drop-in over
    gpulayers' ops), view, container or helper (nothing to compute: torch's own object), or left to torch.

    Its text is a table of counts, and the names left to torch with the reason.
    """
    ours, functions = (vars(sys.modules[f"gpulayers.torch{part}"]) for part in ("", ".functional"))
    classes = [n for n, c in _public(nn) if inspect.isclass(c)]
    callables = [n for n, c in _public(F) if n.islower() and callable(c)]
    return Coverage({n: _state(n, ours) for n in classes}, {n: _state(n, functions) for n in callables})


def _public(module: Any) -> list[tuple[str, Any]]:
    return [(n, getattr(module, n)) for n in dir(module) if not n.startswith("_")]


def _state(name: str, ours: dict[str, Any]) -> str:
    return AS_IS if name in _AS_IS else KERNELS if name in ours else LEFT
