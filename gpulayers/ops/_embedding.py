"""What looks rows of a table up shares: what a table and its indices are, and how gradients come back to its rows."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, namespace, up
from gpulayers.definition import KindError, LabelError, ShapeError
from gpulayers.ops._op import require_float


def require_table(weight: Spec, indices: Spec) -> None:
    require_float("weight", weight)
    if weight.ndim != 2:
        raise ShapeError("weight", "weight.shape = (num_embeddings, embedding_dim)", list(weight.shape))
    if indices.dtype.kind not in "iu":
        raise ShapeError("indices", "an integer dtype", indices.dtype)


def row_of_padding(padding_idx: Any, rows: Any) -> int | None:
    """``padding_idx`` counted from the front."""
    if padding_idx is None:
        return None
    if not isinstance(padding_idx, int) or isinstance(padding_idx, bool):
        raise KindError("padding_idx", "an integer or None", repr(padding_idx))
    if rows is None:
        return padding_idx
    if not -rows <= padding_idx < rows:
        raise ShapeError("padding_idx", f"{-rows} ≤ padding_idx < num_embeddings = {rows}", padding_idx)
    return padding_idx % rows


def check_indices(weight: Any, indices: Any, *others: Any, **options: Any) -> None:
    """Raises LabelError for an index that no row has."""
    if 0 in indices.shape:
        return
    low, high, rows = int(indices.min()), int(indices.max()), weight.shape[0]
    if low < 0 or high >= rows:
        raise LabelError("indices", f"0 ≤ index < num_embeddings = {rows}", low if low < 0 else high)


def looked_up(weight: Any, indices: Any) -> Any:
    """The row of each index, in the dtype that definitions compute in; NaN for one that is out of range."""
    xp, rows = namespace(weight), weight.shape[0]
    found = up(xp.take(weight, indices.clip(0, max(rows - 1, 0)), 0))
    inside = ((indices >= 0) & (indices < rows))[..., None]
    return xp.where(inside, found, xp.full((), xp.nan, found.dtype))


def counted(indices: Any, rows: int, padding: int | None) -> Any:
    """Whether each index has a row, and a gradient."""
    inside = (indices >= 0) & (indices < rows)
    return inside if padding is None else inside & (indices != padding)


def gathered(terms: Any, indices: Any, counts: Any, weight: Spec, scale_grad_by_freq: bool) -> Any:
    """dweight: to each row the terms of its indices, (N, D), in their order; of those that count."""
    xp = namespace(terms)
    dweight = xp.zeros(weight.shape, terms.dtype)
    at = xp.where(counts, indices, xp.zeros_like(indices))
    terms = xp.where(counts[:, None], terms, xp.zeros((), terms.dtype))
    for i in range(terms.shape[0]):
        dweight[at[i : i + 1]] += terms[i : i + 1]
    if scale_grad_by_freq:
        times = xp.zeros(weight.shape[:1], terms.dtype)
        for i in range(terms.shape[0]):
            times[at[i : i + 1]] += counts[i : i + 1]
        dweight /= xp.where(times > 0, times, xp.ones_like(times))[:, None]
    return dweight.astype(weight.dtype, copy=False)
