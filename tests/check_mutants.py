"""What check_layer is worth: faulty layers that it must catch and name, right ones that it must not accuse.

    python tests/check_mutants.py [--seeds 40] [--library]

Beside it stands torch.autograd.gradcheck, on the same layers.
"""

from __future__ import annotations

import argparse
import collections
import re
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from layer_mutants import MUTANTS, RIGHT
from layer_mutants._kinds import Mutant
from layer_mutants.library import layers

import gpulayers as gl
from gpulayers._table import table
from gpulayers.testing import CheckError, check_layer


def finding(make: Callable[[], gl.Layer], inputs: Sequence, seed: int = 0) -> str | None:
    """What check_layer says of a layer; None if it passes."""
    gl.random.seed(seed)
    try:
        check_layer(make(), *inputs, seed=seed, backends=())
    except CheckError as error:
        return str(error)
    return None


def proven(mutant: Mutant) -> bool:
    """Whether it is faulty: the direct test fails, or the layer itself does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mutant.proof()
        except (AssertionError, AttributeError, RuntimeError, ValueError):
            return True
    return False


class _Call(torch.autograd.Function):
    """A layer's forward and backward as a function of its inputs and weights, each call for itself."""

    @staticmethod
    def forward(ctx: Any, layer: gl.Layer, count: int, *given: torch.Tensor) -> Any:
        ctx.layer, ctx.count = layer, count
        ctx.save_for_backward(*given)
        with gl.no_grad():
            return torch.from_numpy(np.array(_called(layer, count, given)))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        ctx.layer.zero_grad()
        _called(ctx.layer, ctx.count, ctx.saved_tensors)
        dx = ctx.layer.backward(dy.numpy())
        dxs = (dx if isinstance(dx, tuple) else (dx,))[: ctx.count]
        grads = [*dxs, *[None] * (ctx.count - len(dxs)), *(w.grad for w in ctx.layer.trainable_weights)]
        return None, None, *(None if g is None else torch.from_numpy(np.array(g)) for g in grads)


def _called(layer: gl.Layer, count: int, given: Sequence[torch.Tensor]) -> Any:
    gl.random.seed(0)
    for w, data in zip(layer.trainable_weights, given[count:]):
        w.data = data.detach().numpy().copy()
    return layer(*(x.detach().numpy() for x in given[:count]))


def gradcheck(make: Callable[[], gl.Layer], inputs: Sequence) -> bool:
    """Whether torch.autograd.gradcheck passes the layer."""
    gl.random.seed(0)
    layer, random = make(), np.random.default_rng(0)
    shapes = [x if isinstance(x, tuple) else x.shape for x in inputs]
    layer.ensure_built(*((None, *s[1:]) for s in shapes))
    layer.to("float64")
    xs = [torch.from_numpy(random.standard_normal([n or 4 for n in x]) if isinstance(x, tuple) else x) for x in inputs]
    given = [*xs, *(torch.from_numpy(np.array(w.data)) for w in layer.trainable_weights)]
    for t in given:
        t.requires_grad_(t.is_floating_point())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return torch.autograd.gradcheck(lambda *given: _Call.apply(layer, len(xs), *given), given)
        except Exception:
            return False


def of_mutants(mutants: Iterable[Mutant]) -> tuple[list[list[str]], collections.Counter]:
    rows, total = [], collections.Counter()
    for m in mutants:
        start = time.process_time()
        said = finding(m.make, m.inputs)
        seconds = time.process_time() - start
        named = said is not None and bool(re.search(m.names, said))
        theirs = not gradcheck(m.make, m.inputs)
        total.update(mutants=1, proven=proven(m), caught=said is not None, named=named, gradcheck=theirs)
        total["slowest"] = max(total["slowest"], seconds)
        check = "" if said is None else said.split(": ")[1]
        rows.append([m.axis, m.name, check, "yes" if named else "no", "yes" if theirs else "", f"{seconds:.2f}"])
    return rows, total


def of_right(cases: Iterable[tuple], seeds: int) -> tuple[list[list[str]], float]:
    rows, slowest = [], 0.0
    for name, make, inputs in cases:
        alarms, longest = [], 0.0
        for seed in range(seeds):
            start = time.process_time()
            said = finding(make, inputs, seed)
            longest = max(longest, time.process_time() - start)
            if said is not None:
                alarms.append(f"seed {seed}: {said}")
        slowest = max(slowest, longest)
        rows.append([name, len(alarms), f"{longest:.2f}", alarms[0] if alarms else ""])
    return rows, slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=40, help="for each right layer")
    parser.add_argument("--library", action="store_true", help="the library's own layers, too")
    options = parser.parse_args()
    rows, total = of_mutants(MUTANTS)
    print(table(["axis", "mutant", "found by", "named", "gradcheck", "s"], rows))
    print(
        f"\n{total['mutants']} mutants, {total['proven']} proven faulty: check_layer catches {total['caught']} and names "
        f"{total['named']}, gradcheck catches {total['gradcheck']}; the slowest took {total['slowest']:.1f} s\n"
    )
    cases = [*RIGHT, *(layers() if options.library else ())]
    rights, slowest = of_right(cases, options.seeds)
    print(table(["right layer", "alarms", "s", "what it says"], rights))
    alarms = sum(row[1] for row in rights)
    print(
        f"\n{len(rights)} right layers, {options.seeds} seeds: {alarms} false alarms; the slowest took {slowest:.1f} s"
    )
    whole = total["mutants"] == total["proven"] == total["caught"]
    return 0 if whole and total["named"] >= 0.9 * total["mutants"] and not alarms else 1


if __name__ == "__main__":
    raise SystemExit(main())
