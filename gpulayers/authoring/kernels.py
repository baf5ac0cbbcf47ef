"""What ``gpulayers check`` does with an op of one's own: its kernels are held against its definition, and compiled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from gpulayers import dispatch
from gpulayers.arrays import HALVES, Spec
from gpulayers.ops._op import Op
from gpulayers.testing import CheckError, audit_op, check_op

HEAD = ("kernel", "sm", "dtype", "registers", "shared", "blocks an SM", "loads")


def held(op: Op, shapes: Sequence[tuple], dtypes: Sequence[np.dtype], seed: int, options: dict[str, Any]) -> list[str]:
    """The backends that are right on random inputs of these shapes. Raises CheckError, out of bounds and races included."""
    random = np.random.default_rng(seed)
    xs = [random.standard_normal(shape) for shape in shapes]
    small = all(x.size <= 64 for x in xs)
    try:
        return check_op(op, *xs, dtypes=dtypes, numeric=small, seed=seed, **options)
    except CheckError:
        raise
    except Exception as error:
        notes = "; ".join(getattr(error, "__notes__", ()))
        raise CheckError(f"{op.name}: {type(error).__name__}: {error}" + (f" ({notes})" if notes else "")) from error


def compiled(op: Op, shapes: Sequence[tuple], dtypes: Sequence[np.dtype], options: dict[str, Any]) -> Iterator[tuple]:
    """A row, as ``HEAD``, for each kernel in float32 and one 16-bit dtype. Raises CheckError for what speaks against it."""
    kinds = [d for d in dtypes if d not in HALVES][:1] + [d for d in dtypes if d in HALVES][-1:]
    for backend in filter(dispatch.installed, op.kernels):
        for dtype in kinds:
            for r in audit_op(op, *(Spec(shape, dtype) for shape in shapes), backend=backend, **options):
                width = f"{r.loads}-bit" if r.loads else ""
                yield r.kernel, r.arch, str(dtype), r.registers, r.shared, r.blocks_per_sm, width
