"""What gl.fuse is worth: random layers, each fused and held against its own array code, or refused with its line.

python tests/check_fuse.py [--layers 200] [--first 0] [--cut]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import pathlib
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator

import numpy as np
from gpulayers.bench import fused
from random_layers import cut, layer

import gpulayers as gl
from gpulayers import arrays, dispatch
from gpulayers._table import table
from gpulayers.arrays import FLOATS, bfloat16, float32
from gpulayers.fusing import Fusion, FusionError, _launch, fuse, fusion
from gpulayers.ops._op import Op
from gpulayers.testing import CheckError, audit_op, check_op, tolerance
from gpulayers.testing.gpus import GPUS
from gpulayers.testing.interpreter import interpreting


@contextlib.contextmanager
def wide(walked: int = 16) -> Iterator[None]:
    """Within, every row counts as too wide for registers, and is walked by so many elements at a time."""
    before = _launch.held_tile, _launch.WALKED
    _launch.held_tile, _launch.WALKED = (lambda *_: None), walked
    try:
        yield
    finally:
        _launch.held_tile, _launch.WALKED = before


def judged(seed: int, folder: pathlib.Path, dtypes: tuple[str, ...] = ("float32", "bfloat16")) -> str:
    """ "fused", or why not; raises CheckError where a kernel is wrong."""
    made, shapes = layer(seed, folder)
    random = np.random.default_rng(seed)
    try:
        found = fusion(made, *((None, *s[1:]) for s in shapes))
    except FusionError as error:
        return str(error)
    if not isinstance(found, Fusion):
        return f"random{seed} is cut into pieces"
    op, weights = found.op, [w.data + 0.3 * random.standard_normal(w.shape) for w in made.named_weights().values()]
    seeds = [random.integers(0, 2**40, 2) for _ in found.draws]
    xs, needs = [*map(random.standard_normal, shapes), *weights, *seeds], [n for n in op.differentiable if n != "b"]
    check_op(op, *xs, needs=needs, backends=["triton"], dtypes=dtypes, seed=seed)
    for dtype in dtypes:
        check_sum(op, xs, arrays.dtype(dtype), random)
    with wide():
        check_op(op, *xs, needs=needs, backends=["triton"], dtypes=("float32",), seed=seed)
        check_sum(op, xs, float32, random)
    return "fused"


def judged_in_pieces(seed: int, folder: pathlib.Path) -> str:
    """The same for a layer with products and sums over the batch: "cut", or "fused", or why not."""
    made, shapes = cut(seed, folder)
    inputs, random = [(None, *s[1:]) for s in shapes], np.random.default_rng(seed)
    try:
        found = fusion(made, *inputs)
    except FusionError as error:
        return str(error)
    for w in made.weights:
        w.data = (w.data + 0.2 * random.standard_normal(w.shape)).astype(np.float32)
    for batch in (shapes[0][0], 0):
        xs = [random.standard_normal((batch, *s[1:])).astype(np.float32) for s in shapes]
        plain, exact = _step(made, xs, np.float32), _step(made, xs, np.float64)
        with interpreting(), dispatch.policy(simulate=("triton",), backends=("triton", "numpy", "definition")):
            got = _step(fuse(copy.deepcopy(made)), xs, np.float32)
        for i, (a, b, true) in enumerate(zip(got, plain, exact)):
            scale = np.abs(true).max(initial=1e-9)
            off, own = (np.abs(v - true).max(initial=0) / scale for v in (a, b))
            if a.dtype != b.dtype or not off <= 10 * own + 1e-5:
                raise CheckError(
                    f"{made.name}: batch of {batch}: array {i} is off by {off:.1e}, array code by {own:.1e}"
                )
    return "fused" if isinstance(found, Fusion) else "cut"


def _step(layer: gl.Layer, xs: list, dtype: type) -> list:
    """Outputs, gradients of inputs and of weights, from one state of the random numbers."""
    layer, random = copy.deepcopy(layer), np.random.default_rng(0)
    for w in layer.weights:
        w.data = w.data.astype(dtype)
    gl.random.seed(5)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a mean of nothing
        ys = layer(*(x.astype(dtype) for x in xs))
        ys = ys if isinstance(ys, tuple) else (ys,)
        dxs = layer.backward(*(random.standard_normal(y.shape).astype(y.dtype) for y in ys))
    return [*ys, *(dxs if isinstance(dxs, tuple) else (dxs,)), *(w.grad for w in layer.weights)]


def check_sum(op: Op, xs: list, dtype: np.dtype, random: np.random.Generator) -> None:
    """The gradient of b: one number, which adds up what is nowhere negative, all of x. Raises CheckError.

    The plain formula's error in one number may be none by luck, and says little of another order. A tree of additions
    is off by half an ulp of the total for each of its levels, at most (Higham, "The Accuracy of Floating Point
    Summation", 1993).
    """
    given = [x.astype(dtype) if x.dtype.kind == "f" else x for x in xs]
    with interpreting(), dispatch.policy(simulate=("triton",)), gl.only("triton"):
        ys, call = op.record(*given, needs=op.differentiable)
        dys = [random.standard_normal(y.shape).astype(dtype) for y in (ys if isinstance(ys, tuple) else (ys,))]
        got = call.backward(*dys)[op.inputs.index("b")].astype(np.float64)
    truth, plain = (_gradient_of_b(op, given, dys, call.saved, work) for work in (np.float64, np.float32))
    levels = math.ceil(math.log2(max(given[0].size, 1)))
    limit = tolerance.bound(truth, plain.astype(dtype), dtype) + 0.5 * levels * tolerance.ulp(truth, float32)
    if not abs(got - truth) <= limit:
        raise CheckError(f"{op.name}: {dtype}: the gradient of b is {got}, true {truth}: more than {limit} away")


def _gradient_of_b(op: Op, given: list, dys: list, saved: dict, work: type) -> np.ndarray:
    """As the definition computes it in this dtype."""
    up = lambda x: x.astype(work) if x.dtype in FLOATS else x  # noqa: E731
    specs = tuple(map(arrays.spec, given))
    with np.errstate(all="ignore"):
        found = op.backward(tuple(map(up, dys)), {k: up(v) for k, v in saved.items()}, inputs=specs, needs=("b",))
    return found[op.inputs.index("b")]


WIDTHS = (64, 1000, 8192, 65536)
HEAD = ("layer", "columns", "dtype", "MB moved", "generated: registers, warps held", "by hand: registers, warps held")


def audited() -> int:
    """A line for each of the library's layers: its kernels as they were generated, beside those written by hand, for
    sm_90. The number of calls with a fault, for any architecture."""
    wrong, rows = 0, []
    for name, kind in fused.KINDS.items():
        for columns in WIDTHS if kind.by_rows else WIDTHS[2:3]:
            case, layer = fused.case_of(name, 512, columns), kind.layer(columns)
            for dtype in (float32, bfloat16):
                try:
                    generated = audit_op(case.op, *case.specs(dtype))
                    own = audit_op(layer.op, *case.specs(dtype), archs=[90], **layer.options())
                except CheckError as error:
                    wrong += 1
                    print(error, flush=True)
                    continue
                moved = case.traffic(dtype)["both"].total / 1e6
                rows.append([name, columns, str(dtype), f"{moved:.1f}", _said(generated), _said(own)])
    print(table(HEAD, rows))
    return wrong


def _said(reports: list) -> str:
    """Each kernel's registers a thread, and the share of a multiprocessor's warps that are held at once."""
    held = [(r.registers, r.blocks_per_sm * r.warps * 32 / GPUS[r.arch].threads) for r in reports if r.arch == 90]
    return ", ".join(f"{registers} {share:.0%}" for registers, share in held)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--cut", action="store_true", help="layers with matrix products and sums over the batch")
    parser.add_argument("--audit", action="store_true", help="compile, and read the machine code")
    options = parser.parse_args()
    if options.audit:
        return bool(audited())
    judge = judged_in_pieces if options.cut else judged
    fused, refused, wrong, start = Counter[str](), [], [], time.time()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first, options.first + options.layers):
            gl.random.seed(seed)
            try:
                said = judge(seed, pathlib.Path(folder))
            except CheckError as error:
                wrong.append(f"{seed}: {error}")
                print(wrong[-1], flush=True)
                continue
            if said in ("fused", "cut"):
                fused[said] += 1
            else:
                refused.append(f"{seed}: {said}")
                print(refused[-1], flush=True)
    print(
        f"{fused['fused']} fused, {fused['cut']} cut, {len(refused)} refused, {len(wrong)} wrong, in {time.time() - start:.0f} s"
    )
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
