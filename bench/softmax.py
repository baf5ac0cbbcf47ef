"""Softmax of attention scores, classifiers and vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from gpulayers.arrays import FLOATS, Spec
from gpulayers.ops._op import Op
from gpulayers.ops.softmax import log_softmax, softmax, softmin

from .cases.case import ONE_ARCH, Case, Other, sweep

_LENGTHS = 256, 1024, 4096, 16384, 65536


def _liger(x: torch.Tensor) -> torch.Tensor:
    from liger_kernel.transformers.functional import liger_softmax

    return liger_softmax(x)


def _case(op: Op, name: str, shape: tuple[int, ...], theirs: Callable, cpu: bool = False) -> Case:
    others = {"liger": Other(_liger, "liger_kernel")} if op is softmax else {}
    return Case(op, name, (shape,), {}, partial(theirs, dim=-1), cpu=cpu, others=others)


def cases() -> list[Case]:
    found = []
    for op, theirs in ((softmax, torch.softmax), (log_softmax, torch.log_softmax)):
        for name, shape, cpu in (
            ("small", (64, 10), True),
            ("attention scores", (8, 12, 128, 128), True),
            ("vocabulary", (64, 32000), True),
            ("attention scores", (8, 16, 2048, 2048), False),
            ("vocabulary", (4096, 32768), False),
            ("vocabulary", (4096, 131072), False),
        ):
            headline = (name, cpu) == ("attention scores", False)
            found.append(_case(op, f"{name} {shape}", shape, theirs, cpu)._replace(headline=headline))
        found += sweep("row length, 4,096 rows", [(n, _case(op, "", (4096, n), theirs)) for n in _LENGTHS])
        segmentation = (16, 21, 512, 512)
        found.append(
            Case(op, f"segmentation {segmentation}", (segmentation,), {"axis": 1}, partial(theirs, dim=1), cpu=False)
        )
    softmin_of = partial(torch.nn.functional.softmin, dim=-1)
    for name, shape, cpu in (("attention scores", (8, 12, 128, 128), True), ("vocabulary", (4096, 32768), False)):
        found.append(Case(softmin, f"{name} {shape}", (shape,), {}, softmin_of, cpu=cpu))
    return found


def audits() -> list[Case]:
    """The longest rows that forward and backward hold, rows that they walk, and columns."""
    found = []
    for op in (softmax, log_softmax, softmin):
        archs = (80, 90, 100) if op is softmax else ONE_ARCH
        found += [
            Case(op, "longest row forward", ((4096, 32768),), needs=(), archs=archs),
            Case(op, "longest row backward", ((4096, 16384),), archs=archs),
            Case(op, "walked", ((64, 131072),), archs=archs),
        ]
    return [
        *found,
        Case(softmax, "8 divides it", ((4096, 1000),), archs=ONE_ARCH),
        Case(softmax, "held by 8 warps", ((4096, 8192),), archs=ONE_ARCH),
        Case(softmax, "columns", ((32, 1024, 4096),), {"axis": 1}),
        # What is not row-major is copied first.
        *(Case(softmax, f"turned {d}", (Spec((4096, 1024), d, (1, 0)),)) for d in FLOATS[1:]),
        Case(log_softmax, "columns", ((32, 1024, 4096),), {"axis": 1}, archs=ONE_ARCH),
    ]
