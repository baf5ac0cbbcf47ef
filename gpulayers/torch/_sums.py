"""A residual stream: x + residual and the norm of that, in one op, also where autocast makes 16 bits of the one and 32 of the
other; and the sum at the end of a block with the norm that the next block begins with.

Which norm that is shows when the model runs: the first time a sum is followed by a norm, its block learns it. From then on
the block computes both, and the norm, given that very sum, hands on what is there. Where anything differs (another norm,
a hook's own tensor, a sum that was written to, checkpoints, which may keep nothing) the norm computes as ever.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn as nn
from torch import Tensor

from gpulayers.torch import _autocast
from gpulayers.torch._acts import is_bare
from gpulayers.torch._arguments import held
from gpulayers.torch._op import in_dynamo
from gpulayers.torch._reading import reads
from gpulayers.torch._rms_norm import RMSNormLike
from gpulayers.torch.norm import LayerNorm, RMSNorm, add_layer_norm, add_rms_norm, alike

NORMS = (LayerNorm, RMSNorm)
_LATER, _MADE_BY = "_gpulayers_later", "_gpulayers_made_by"
"""Of a sum: what was computed from it already; the block that made it."""

_autocasting = torch._C._is_any_autocast_enabled
_transforming = torch._C._are_functorch_transforms_active
_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_next: weakref.WeakKeyDictionary[nn.Module, dict[int, Any]] = weakref.WeakKeyDictionary()
"""{a block: {which of its sums: (the norm that takes it, that norm's readers); None where several do}}."""


class _Later(NamedTuple):
    norm: Any
    y: Tensor
    made_by: tuple[nn.Module, int]
    state: tuple
    """On what y depends beside the sum: whether it still holds."""


def is_norm(module: Any) -> bool:
    return type(module) in NORMS or (isinstance(module, RMSNormLike) and not module.one_plus)


def add_norm(norm: Any, x: Tensor, residual: Tensor, readers: tuple = ()) -> tuple[Tensor, Tensor]:
    """(norm(x + residual), x + residual). readers: who reads the first, if linear layers alone do."""
    found = _fused(norm, x, residual, readers)
    if found is not None:
        return found
    total = x + residual
    return norm(total), total


def add_at_end(block: Any, x: Tensor, residual: Tensor, site: int = 0) -> Tensor:
    """x + residual, the last of a block's forward, or one of several sums."""
    if in_dynamo() or not _is_free():
        return x + residual
    norm, readers = _next.get(block, {}).get(site, _UNKNOWN) or _NONE
    found = None if norm is None else _fused(norm, x, residual, readers or ())
    if found is not None:
        y, total = found
        vars(total)[_LATER] = _Later(norm, y, (block, site), _state(norm, total))
        return total
    total = x + residual
    if norm is None and readers is not None:
        vars(total)[_MADE_BY] = block, site, total._version
    return total


def taken(norm: Any, x: Tensor, readers: tuple) -> Tensor | None:
    """norm(x), where the block that made x has computed it; None where not."""
    if in_dynamo() or not (kept := vars(x)) or not _is_free():
        return None
    later = kept.get(_LATER)
    if later is None:
        block, site, version = kept.pop(_MADE_BY, (None, 0, 0))
        if block is not None and is_bare(norm) and x._version == version:
            _next.setdefault(block, {})[site] = norm, readers
        return None
    if later.norm is not norm:
        block, site = later.made_by
        _next[block][site] = None
        return None
    return later.y if is_bare(norm) and later.state == _state(norm, x) else None


_UNKNOWN, _NONE = (None, ()), (None, None)


def _is_free() -> bool:
    """Whether nobody looks on, and nobody keeps what a backward needs in his own way, as checkpoints do."""
    return not _transforming() and forward_ad._current_level < 0 and _hooks(False) is None


def _state(norm: Any, total: Tensor) -> tuple:
    weights = [p._version for p in norm._parameters.values() if p is not None]
    node, device = total.grad_fn, total.device.type
    cast = torch.get_autocast_dtype(device) if _autocast.is_on(device) else None
    return id(node), total._version, torch.is_grad_enabled(), cast, *weights


def _fused(norm: Any, x: Tensor, residual: Tensor, readers: tuple) -> tuple[Tensor, Tensor] | None:
    """(norm(x + residual), x + residual) in one op, in the dtypes that the two would have; None where it has not these."""
    if not is_norm(norm) or not is_bare(norm) or not (isinstance(x, Tensor) and isinstance(residual, Tensor)):
        return None
    if x.shape != residual.shape or x.device != residual.device:
        return None
    device = x.device.type
    if device != _autocast.WIDENED or not torch.is_autocast_enabled(device):
        like = not isinstance(norm, RMSNormLike) or norm.weight.dtype == x.dtype
        return _call(norm, x, residual, None) if like and alike(x, residual) and _is_held(norm, x) else None
    half = torch.get_autocast_dtype(device)
    kinds = {x.dtype, residual.dtype}
    weight = norm._parameters.get("weight")
    if not kinds <= {torch.float32, half} or weight is None or weight.dtype is not torch.float32:
        return None
    if not _is_held(norm, x):
        return None
    lowers = bool(readers) and all(map(reads, readers))
    if kinds == {half}:  # a sum of 16 bits: torch's norm of it has 32
        return _without_autocast(norm, x, residual, None) if lowers else None
    return _without_autocast(norm, x, residual, half if lowers else None)


def _is_held(norm: Any, x: Tensor) -> bool:
    """Whether its weights are here and whole: of another block they may be sharded at this moment, or elsewhere."""
    shape = torch.Size(_shape(norm))
    weights = [p for p in norm._parameters.values() if p is not None]
    return all([type(p) in _autocast.KINDS and p.shape == shape and p.device == x.device for p in weights])


def _without_autocast(norm: Any, x: Tensor, residual: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    if in_dynamo():
        with torch.autocast(x.device.type, enabled=False):
            return _call(norm, x, residual, dtype)
    device = x.device.type  # as the context manager would, at a tenth of its cost
    torch.set_autocast_enabled(device, False)
    try:
        return _call(norm, x, residual, dtype)
    finally:
        torch.set_autocast_enabled(device, True)


def _call(norm: Any, x: Tensor, residual: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    shape, weight = _shape(norm), held(norm, "weight")
    if isinstance(norm, RMSNormLike):
        return add_rms_norm(x, residual, shape, weight, getattr(norm, norm._eps), dtype=dtype)
    if type(norm) is RMSNorm:
        return add_rms_norm(x, residual, shape, weight, norm.eps, dtype=dtype)
    return add_layer_norm(x, residual, shape, weight, held(norm, "bias"), norm.eps, dtype=dtype)


def _shape(norm: Any) -> tuple[int, ...]:
    return norm.weight.shape if isinstance(norm, RMSNormLike) else norm.normalized_shape
