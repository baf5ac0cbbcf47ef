"""Embeddings by torch."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec

from ._tensors import FLOAT32, plainly, refusal

REFUSALS = {
    "dtype": FLOAT32,
    "bags": "maxima, gradients of factors or by frequency, and nothing at all are left to the NumPy kernel",
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


def embedding_bag_refuses(
    weight: Spec, indices: Spec, *others: Any, needs: tuple, mode: str, scale_grad_by_freq: bool, **options: Any
) -> str | None:
    left = mode == "max" or "per_sample_weights" in needs or scale_grad_by_freq or 0 in (weight.size, indices.size)
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
    flat, factors = indices.reshape(-1), None if per_sample_weights is None else per_sample_weights.reshape(-1)
    starts = torch.arange(0, indices.numel(), indices.shape[-1]) if offsets is None else offsets
    how = False, ("sum", "mean").index(mode), False, factors, include_last_offset, padding_idx
    y = plainly(torch.ops.aten.embedding_bag.padding_idx, weight, flat, starts.to(flat.dtype), *how)[0]
    saved = {"indices": indices} | ({} if offsets is None else {"offsets": offsets})
    if per_sample_weights is not None:
        saved["per_sample_weights"] = per_sample_weights
    if mode == "mean" and needs:
        bag, here, count = _bags(indices, offsets, include_last_offset, padding_idx)
        saved["sizes"] = torch.zeros(count, dtype=torch.int64).index_add(0, bag, here.long())
    return (y.contiguous(),), saved if needs else {}


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
    return plainly(_weights_gradient, dys[0], saved, inputs[0], padding_idx, include_last_offset), None, None, None


def _weights_gradient(dy: torch.Tensor, saved: dict, weight: Spec, padding: int | None, last: bool) -> torch.Tensor:
    indices, offsets = saved["indices"], saved.get("offsets")
    bag, here, _ = _bags(indices, offsets, last, padding)
    rows = (dy / saved["sizes"].clamp(min=1)[:, None] if "sizes" in saved else dy)[bag]
    if "per_sample_weights" in saved:
        rows = rows * saved["per_sample_weights"].reshape(-1, 1)
    rows = torch.where(here[:, None], rows, 0)
    return torch.ops.aten.embedding_dense_backward(rows, indices.reshape(-1), weight.shape[0], -1, False)
