"""Rows of a table looked up by indices: one for each index, or sums, means and maxima over bags of them."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, namespace, up
from gpulayers.definition import KindError, LabelError, Rule, ShapeError
from gpulayers.ops._op import Op, require_float


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


def embedding_rule(
    weight: Spec,
    indices: Spec,
    *,
    needs: tuple = (),
    padding_idx: Any = None,
    scale_grad_by_freq: bool = False,
) -> Rule:
    require_table(weight, indices)
    options = {"padding_idx": row_of_padding(padding_idx, weight.shape[0]), "scale_grad_by_freq": scale_grad_by_freq}
    y = Spec((*indices.shape, weight.shape[1]), weight.dtype)
    grads = {"weight": Spec(weight.shape, weight.dtype)}
    return Rule({"y": y}, {"indices": indices} if needs else {}, options, grads)


def embedding_forward(
    weight: Any,
    indices: Any,
    *,
    needs: tuple = (),
    padding_idx: int | None = None,
    scale_grad_by_freq: bool = False,
) -> tuple[tuple, dict]:
    """y[…] = weight[indices[…]].

    weight: (num_embeddings, embedding_dim), float: the table. indices: any shape, integers from 0 to num_embeddings − 1.
    padding_idx: a row without gradient. scale_grad_by_freq: a row's gradient is divided by how often its index occurs.
    Returns y: (*indices.shape, embedding_dim), weight's dtype. Saves indices alone. Raises LabelError for an index out of
    range on the CPU; on a GPU it makes NaN. As torch.nn.functional.embedding, but for max_norm, which changes weight.
    """
    y = looked_up(weight, indices).astype(weight.dtype, copy=False)
    return (namespace(y).ascontiguousarray(y),), {"indices": indices} if needs else {}


def embedding_backward(
    dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, padding_idx: int | None, scale_grad_by_freq: bool
) -> tuple:
    """dweight[v] = Σ dy over the places whose index is v, 0 for the padding's; divided by their number, where so asked."""
    (dy,), indices = dys, saved["indices"].reshape(-1)
    weight = inputs[0]
    counts = counted(indices, weight.shape[0], padding_idx)
    terms = up(dy).reshape(indices.shape[0], weight.shape[1])
    return gathered(terms, indices, counts, weight, scale_grad_by_freq), None


embedding = Op(embedding_rule, embedding_forward, embedding_backward, differentiable=("weight",), check=check_indices)
