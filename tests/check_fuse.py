"""What gl.fuse is worth: random layers, each fused and held against its own array code, or refused with its line.

python tests/check_fuse.py [--layers 200] [--first 0]
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import tempfile
import time
from collections.abc import Iterator

import numpy as np
from random_layers import layer

import gpulayers as gl
from gpulayers.arrays import Spec, bfloat16, float32
from gpulayers.fusing import FusionError, _launch, fusion
from gpulayers.testing import CheckError, audit_op, check_op


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
        op = fusion(made, *((None, *s[1:]) for s in shapes)).op
    except FusionError as error:
        return str(error)
    weights = [w.data + 0.3 * random.standard_normal(w.shape) for w in made.named_weights().values()]
    xs = [*map(random.standard_normal, shapes), *weights]
    check_op(op, *xs, backends=["triton"], dtypes=dtypes, seed=seed)
    with wide():
        check_op(op, *xs, backends=["triton"], dtypes=("float32",), seed=seed)
    return "fused"


WIDTHS = (64, 1000, 8192, 65536)
DEFINED = {
    "LayerNorm": lambda n: gl.LayerNorm(n),
    "RMSNorm": lambda n: gl.RMSNorm(n),
    "GELU": lambda n: gl.GELU(),
    "SiLU": lambda n: gl.SiLU(),
    "Softmax": lambda n: gl.Softmax(-1),
}


def audited() -> int:
    """A line for each kernel. The number of calls with a fault."""
    wrong = 0
    for name, make in DEFINED.items():
        for columns in WIDTHS:
            made = make(columns)
            op = fusion(made, (None, columns)).op
            for dtype in (float32, bfloat16):
                specs = [Spec((512, columns), dtype), *(Spec(w.shape, dtype) for w in made.named_weights().values())]
                try:
                    for r in audit_op(op, *specs):
                        moved = f"{r.registers} registers, {r.loads}-bit loads, {r.stores}-bit stores"
                        print(f"{name} {columns} {dtype} sm_{r.arch} {r.kernel}: {moved}", flush=True)
                except CheckError as error:
                    wrong += 1
                    print(error, flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first one's seed")
    parser.add_argument("--audit", action="store_true", help="compile, and read the machine code")
    options = parser.parse_args()
    if options.audit:
        return bool(audited())
    fused, refused, wrong, start = 0, [], [], time.time()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first, options.first + options.layers):
            gl.random.seed(seed)
            try:
                said = judged(seed, pathlib.Path(folder))
            except CheckError as error:
                wrong.append(f"{seed}: {error}")
                print(wrong[-1], flush=True)
                continue
            fused += said == "fused"
            if said != "fused":
                refused.append(f"{seed}: {said}")
                print(refused[-1], flush=True)
    print(f"{fused} fused, {len(refused)} refused, {len(wrong)} wrong, in {time.time() - start:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())
