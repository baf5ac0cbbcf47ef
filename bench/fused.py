"""The library's own norms, activations and softmax, fused from their array code, beside the kernels written by hand.

No family of ops: ``gl.fuse`` writes these kernels. They stand beside the library's own ("hand-written"), and the array
code itself on CuPy ("array code"), which runs as often as it has steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import gpulayers as gl
from gpulayers.fusing import Fusion, fusion

from .cases.case import Case, Other
from .cases.providers import Ours

COLUMNS = 64, 1024, 8192, 65536
_ELEMENTS = 1 << 25


class Kind(NamedTuple):
    layer: Callable[[int], gl.OpLayer]
    """For rows of this length."""
    torch: Callable[..., torch.Tensor]
    by_rows: bool = True
    """Whether the length of rows matters to its kernels."""


def _layer_norm(x: Any, weight: Any, bias: Any) -> torch.Tensor:
    return F.layer_norm(x, weight.shape, weight, bias)


def _rms_norm(x: Any, weight: Any) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight)


KINDS = {
    "LayerNorm": Kind(lambda n: gl.LayerNorm(n), _layer_norm),
    "RMSNorm": Kind(lambda n: gl.RMSNorm(n), _rms_norm),
    "Softmax": Kind(lambda n: gl.Softmax(-1), partial(torch.softmax, dim=-1)),
    "GELU": Kind(lambda n: gl.GELU(), F.gelu, by_rows=False),
    "SiLU": Kind(lambda n: gl.SiLU(), F.silu, by_rows=False),
}


@functools.cache
def recorded(name: str, columns: int) -> Fusion:
    """The kernels of one of ``KINDS`` for rows of this length; its op is called fused_…, as none of the library's is."""
    layer = KINDS[name].layer(columns)
    layer.name = f"Fused{name}"
    return fusion(layer, (None, columns))


class _ByHand(Ours):
    """The op that stands in ``ops/``, on one backend."""

    def __init__(self, case: Case, layer: gl.OpLayer, backend: str, no_graph: str = ""):
        super().__init__(Case(layer.op, case.name, case.shapes, layer.options()), backend)
        self.no_graph = no_graph


def case_of(name: str, rows: int, columns: int) -> Case:
    """One of ``KINDS`` on an array of this size."""
    kind, layer = KINDS[name], KINDS[name].layer(columns)
    by_hand = partial(_ByHand, layer=layer, backend="triton")
    array_code = partial(_ByHand, layer=layer, backend="definition", no_graph="CuPy allocates as it goes")
    others = {
        "hand-written": Other(kind.torch, "triton", made=by_hand),
        "array code": Other(kind.torch, "cupy", made=array_code),
    }
    shapes = ((rows, columns), *(w.shape for w in layer.named_weights().values()))
    op = recorded(name, columns).op
    return Case(op, f"{rows}×{columns}", shapes, torch=kind.torch, cpu=False, others=others)


def cases() -> list[Case]:
    found = []
    for name, kind in KINDS.items():
        for columns in COLUMNS if kind.by_rows else (8192,):
            headline = (name, columns) == ("LayerNorm", 8192)
            found.append(case_of(name, _ELEMENTS // columns, columns)._replace(headline=headline))
    return found
