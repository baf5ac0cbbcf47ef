"""What a training step of a patched language model should take on an H200, in bfloat16 autocast: no GPU is asked.

    python -m gpulayers.bench.judging.predicted_language [GPT-2 Llama-1B]

Every op of the step, gpulayers' and torch's own, is found with fake tensors of the model's size (``trace.py``), and its launches
are counted. Products, attention and the head's loss take as long as ``predicted_linear.py``, ``predicted_attention.py`` and
``predicted_loss.py`` have them; all else as long as the bytes that it moves, by the rules of ``predicted_step.py``. To be held
against the next run.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

from gpulayers.bench.judging import predicted_attention, predicted_linear, predicted_loss
from gpulayers.bench.judging.predicted import COPY, PRODUCTS, SHARE
from gpulayers.bench.judging.predicted_step import ATTENTION, LAUNCH, Line
from gpulayers.bench.judging.step import UPDATES
from gpulayers.bench.judging.trace import Ran, traced
from gpulayers.bench.models.kind import Kind
from gpulayers.bench.models.zoo import kinds

from gpulayers._table import table

ASKED = ("GPT-2", "Llama-1B")
MEASURED = {"GPT-2": "torch 46.0 ms, torch.compile 33.4 ms; the goal is 0.8 times that, 26.7 ms"}
"""Of steps there, by others."""
_BACKWARD = "_backward"
_KINDS = {"_to_copy": "torch: casts", "clone": "torch: copies", "copy_": "torch: copies", "cat": "torch: copies"}
_ELEMENTWISE = ("add", "sub", "mul", "neg", "sum", "div")


def kind_of(ran: Ran) -> str:
    """The row of the table that an operation belongs to."""
    if not ran.is_ours:
        if "attention" in ran.name:
            return "torch: attention"
        return _KINDS.get(
            ran.name, "torch: sums, products" if ran.name.rstrip("_") in _ELEMENTWISE else "torch: others"
        )
    back = ran.name.endswith(_BACKWARD)
    return f"{ran.name.removesuffix(_BACKWARD)}, {'backward' if back else 'forward'}"


def flops(ran: Ran) -> float:
    """On tensor cores."""
    return sum(2.0 * m * n * k for m, n, k in _products(ran)) + _attended(ran)


def _products(ran: Ran) -> list[tuple[int, int, int]]:
    """(M, N, K) of each product of a linear layer, of several layers as one."""
    name, back = ran.name.removesuffix(_BACKWARD), ran.name.endswith(_BACKWARD)
    if not ran.is_ours or name not in ("linear", "linears", "linear_cross_entropy"):
        return []
    *lead, k = ran.inputs["x"]
    m = math.prod(lead)
    n = sum(shape[0] for key, shape in ran.inputs.items() if key.startswith(("weight", "linear_weight")))
    if name == "linear_cross_entropy":
        n = ran.inputs["linear_weight" if "linear_weight" in ran.inputs else "weight"][0]
        return [] if back else [(m, n, k)] * 3
    return [(m, k, n), (n, k, m)] if back else [(m, n, k)]


def _attended(ran: Ran) -> float:
    if "attention" not in ran.name:
        return 0.0
    q = ran.inputs["q" if ran.is_ours else "1" if ran.name.endswith(_BACKWARD) else "0"]
    return (5 if ran.name.endswith(_BACKWARD) else 2) * math.prod(q) * q[-2]  # causal: half of the pairs


def seconds(ran: Ran) -> float:
    """What an operation should take; launches that follow each other do not overlap."""
    moved = ran.nbytes / (SHARE * COPY) + ran.launches * LAUNCH
    if ran.is_ours and ran.name == "linear_cross_entropy":
        (tokens, classes, features), *_ = _products(ran)
        return predicted_loss.predicted(tokens, features, classes, "H200").all
    if products := _products(ran):
        found = sum(predicted_linear.product(*product) for product in products)
        if ran.options.get("activation") and ran.name.endswith(_BACKWARD):  # a pass over dy, which makes dz
            found += 3 * 2 * products[0][0] * products[0][2] / (SHARE * COPY) + LAUNCH
        return max(found, moved)
    if "attention" in ran.name:
        return _attention(ran) + ran.launches * LAUNCH
    return moved


def _attention(ran: Ran) -> float:
    if not ran.is_ours:
        return _attended(ran) / ATTENTION
    n, heads, tokens, width = ran.inputs["q"]
    shape = predicted_attention.Shape(n, heads, tokens, width, bool(ran.options.get("causal")))
    return predicted_attention.predicted(shape)[ran.name.endswith(_BACKWARD)].seconds


def lines(kind: Kind, fuse: bool = True) -> list[Line]:
    """By what runs, in the order of the first of each; the whole step comes last."""
    found: dict[str, Line] = {}
    for ran in traced(kind, fuse):
        name = kind_of(ran)
        before = found.get(name, Line(name, 0, 0.0, 0.0, 0.0))
        more = ran.launches, ran.nbytes / 1e9, flops(ran) / 1e12, seconds(ran) * 1e3
        found[name] = Line(name, *(a + b for a, b in zip(before[1:], more)))  # type: ignore[arg-type]
    numbers = sum(p.numel() for p in kind.on_meta()[0].parameters())
    moved = 4.0 * UPDATES[kind.optimizer][1] * numbers
    found["update"] = Line("update", 1, moved / 1e9, 0.0, (moved / (SHARE * COPY) + LAUNCH) * 1e3)
    return [*found.values(), Line("a step", *map(sum, list(zip(*found.values()))[1:]))]  # type: ignore[arg-type]


def shown(name: str, kind: Kind) -> str:
    """A model's table, and what others take."""
    rows = [(*line[:2], *(f"{n:.2f}" for n in (*line[2:], _limit(line)))) for line in lines(kind)]
    text = table((name, "launches", "GB", "TFLOP", "ms", "ms at the limit"), rows)
    return text + (f"\nmeasured there: {MEASURED[name]}" if name in MEASURED else "")


def _limit(line: Line) -> float:
    """ms that the bytes or the flops take at the measured rates."""
    return max(line.gigabytes * 1e9 / COPY, line.teraflops * 1e12 / PRODUCTS) * 1e3


def main(names: Iterable[str]) -> None:
    found = kinds("full", [*names])
    print("\n\n".join(shown(name, kind) for name, kind in found.items()))


if __name__ == "__main__":
    main(sys.argv[1:] or ASKED)
