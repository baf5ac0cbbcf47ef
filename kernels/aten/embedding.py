"""Embeddings by torch."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec

from ._tensors import FLOAT32, plainly, refusal

REFUSALS = {
    "dtype": FLOAT32,
    "bags": "gradients by frequency, a last offset (after which torch reads on) and nothing at all are left to the NumPy kernel",
}


def embedding_refuses(weight: Spec, indices: Spec, *, needs: tuple = (), **options: Any) -> str | None:
    return refusal(weight)


def embedding_forward(
    weight: torch.Tensor, indices: torch.Tensor, *, needs: tuple = (), padding_idx: int | None, scale_grad_by_freq: bool
) -> tuple[tuple, dict]:
    return (plainly(torch.embedding, weight, indices).contiguous(),), {"indices": indices} if needs else {}


def embedding_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, padding_idx: int | None, scale_grad_by_freq: bool
) -> tuple:
    padding = -1 if padding_idx is None else padding_idx
    rows = inputs[0].shape[0]
    gradient = torch.ops.aten.embedding_dense_backward
    return plainly(gradient, dys[0], saved["indices"], rows, padding, scale_grad_by_freq), None


# --- bags ------------------------------------------------------------------------------------------------------------

MODES = ("sum", "mean", "max")


def embedding_bag_refuses(
    weight: Spec,
    indices: Spec,
    *others: Any,
    needs: tuple,
    scale_grad_by_freq: bool,
    include_last_offset: bool,
    **options: Any,
) -> str | None:
    left = scale_grad_by_freq or include_last_offset or 0 in (weight.size, indices.size)
    return refusal(weight) or (REFUSALS["bags"] if left else None)


def _bags(
    indices: torch.Tensor, offsets: Any, last: bool, padding: int | None
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(the bag of each index, whether it belongs there, how many bags)."""
    flat, places = indices.reshape(-1), torch.arange(indices.numel())
    if offsets is None:
        bag, count = places // indices.shape[1], indices.shape[0]
    else:
        bag, count = torch.bucketize(places, offsets.long(), right=True) - 1, offsets.shape[0] - last
    here = (bag >= 0) & (bag < count)
    return torch.where(here, bag, 0), here if padding is None else here & (flat != padding), count


def embedding_bag_forward(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: Any = None,
    per_sample_weights: Any = None,
    *,
    needs: tuple = (),
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
) -> tuple[tuple, dict]:
    flat, factors = indices.reshape(-1).contiguous(), per_sample_weights
    starts = torch.arange(0, indices.numel(), indices.shape[-1]) if offsets is None else offsets.contiguous()
    factors = None if factors is None else factors.reshape(-1)
    how = False, MODES.index(mode), False, factors, include_last_offset, padding_idx
    y, _, _, rows = plainly(torch.ops.aten.embedding_bag.padding_idx, weight, flat, starts.to(flat.dtype), *how)
    if not needs:
        return (y.contiguous(),), {}
    saved = {"indices": indices} | ({} if offsets is None else {"offsets": offsets})
    if "per_sample_weights" in needs:
        saved["weight"] = weight
    if per_sample_weights is not None and "weight" in needs:
        saved["per_sample_weights"] = per_sample_weights
    if mode != "sum":
        bag, here, count = _bags(indices, offsets, include_last_offset, padding_idx)
        if mode == "mean":
            saved["sizes"] = torch.zeros(count, dtype=torch.int64).index_add(0, bag, here.long())
        else:
            saved["winners"] = _places(flat, rows, bag, here)
    return (y.contiguous(),), saved


def _places(flat: torch.Tensor, rows: torch.Tensor, bag: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
    """Where the row that won stands first in its bag; -1 in an empty one."""
    many, each = flat.numel(), torch.arange(flat.numel())[:, None]
    at = torch.where(here[:, None] & (flat[:, None] == rows[bag]), each, many)
    first = torch.full(rows.shape, many, dtype=torch.int64).scatter_reduce(0, bag[:, None].expand_as(at), at, "amin")
    return torch.where(first == many, -1, first)


def embedding_bag_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    mode: str,
    padding_idx: int | None,
    include_last_offset: bool,
    scale_grad_by_freq: bool,
) -> tuple:
    dy, kept = dys[0], (saved["indices"], saved.get("offsets"))
    bag, here, _ = _bags(*kept, include_last_offset, padding_idx)
    dweight = dfactors = None
    if "weight" in needs:
        dweight = plainly(_weights_gradient, dy, saved, inputs[0], bag, here)
    if "per_sample_weights" in needs:
        dfactors = plainly(_factors_gradient, dy, saved["weight"], saved["indices"], bag, here)
    return dweight, None, None, dfactors


def _weights_gradient(
    dy: torch.Tensor, saved: dict, weight: Spec, bag: torch.Tensor, here: torch.Tensor
) -> torch.Tensor:
    flat = saved["indices"].reshape(-1)
    if "winners" in saved:
        won, columns = saved["winners"], torch.arange(weight.shape[1])
        to = flat.long()[won.clamp(min=0)] * weight.shape[1] + columns
        found = dy.new_zeros(weight.shape[0] * weight.shape[1])
        return found.scatter_add(0, to.reshape(-1), torch.where(won < 0, 0, dy).reshape(-1)).view(weight.shape)
    rows = (dy / saved["sizes"].clamp(min=1)[:, None] if "sizes" in saved else dy)[bag]
    if "per_sample_weights" in saved:
        rows = rows * saved["per_sample_weights"].reshape(-1, 1)
    rows = torch.where(here[:, None], rows, 0)
    return torch.ops.aten.embedding_dense_backward(rows, flat, weight.shape[0], -1, False)


def _factors_gradient(
    dy: torch.Tensor, weight: torch.Tensor, indices: torch.Tensor, bag: torch.Tensor, here: torch.Tensor
) -> torch.Tensor:
    each = (dy[bag] * weight[indices.reshape(-1)]).sum(1)
    return torch.where(here, each, 0).reshape(indices.shape)
