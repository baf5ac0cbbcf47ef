"""Rows of a table summed, averaged or compared over bags of indices: embedding_bag."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, compute_dtype, int64, namespace, up
from gpulayers.definition import ArgumentError, Rule, ShapeError, UnsupportedTypeError
from gpulayers.ops._embedding import check_indices, counted, gathered, looked_up, require_table, row_of_padding
from gpulayers.ops._op import Op, require_same_dtype, require_shape

MODES = ("sum", "mean", "max")


def _count(indices: Spec, offsets: Spec | None, include_last_offset: bool) -> Any:
    """The number of bags."""
    if indices.ndim == 2:
        if offsets is not None:
            raise ArgumentError("offsets", "None where indices.shape = (B, L)", list(offsets.shape))
        if include_last_offset:
            raise ArgumentError("include_last_offset", "False where indices.shape = (B, L)", include_last_offset)
        return indices.shape[0]
    if indices.ndim != 1:
        raise ArgumentError("indices", "indices.shape = (N,) with offsets, or (B, L)", list(indices.shape))
    if offsets is None or offsets.ndim != 1:
        came = None if offsets is None else list(offsets.shape)
        raise ArgumentError("offsets", "offsets.shape = (B,) where indices.shape = (N,)", came)
    if offsets.dtype.kind not in "iu":
        raise ShapeError("offsets", "an integer dtype", offsets.dtype)
    if include_last_offset and offsets.shape[0] == 0:
        raise ShapeError("offsets", "offsets.shape = (B + 1,) where include_last_offset", [0])
    return None if offsets.shape[0] is None else offsets.shape[0] - include_last_offset


def embedding_bag_rule(
    weight: Spec,
    indices: Spec,
    offsets: Spec | None = None,
    per_sample_weights: Spec | None = None,
    *,
    needs: tuple = (),
    mode: str = "mean",
    padding_idx: Any = None,
    include_last_offset: bool = False,
    scale_grad_by_freq: bool = False,
) -> Rule:
    require_table(weight, indices)
    if mode not in MODES:
        raise ArgumentError("mode", f"one of {', '.join(MODES)}", repr(mode))
    bags = _count(indices, offsets, include_last_offset)
    if per_sample_weights is not None:
        if mode != "sum":
            raise UnsupportedTypeError("per_sample_weights", 'None where mode is not "sum"', f"mode {mode!r}")
        require_same_dtype(weight, per_sample_weights=per_sample_weights)
        require_shape(
            "per_sample_weights", per_sample_weights, indices.shape, "per_sample_weights.shape = indices.shape"
        )
    if mode == "max" and scale_grad_by_freq:
        raise ArgumentError("scale_grad_by_freq", 'False where mode is "max"', scale_grad_by_freq)
    y = Spec((bags, weight.shape[1]), weight.dtype)
    saved = {"indices": indices} | ({} if offsets is None else {"offsets": offsets})
    if "per_sample_weights" in needs:
        saved["weight"] = weight
    if per_sample_weights is not None and "weight" in needs:
        saved["per_sample_weights"] = per_sample_weights
    if mode != "sum":
        saved |= {"winners": y._replace(dtype=int64)} if mode == "max" else {"sizes": Spec((bags,), int64)}
    options = {"mode": mode, "padding_idx": row_of_padding(padding_idx, weight.shape[0])}
    options |= {"include_last_offset": bool(include_last_offset), "scale_grad_by_freq": bool(scale_grad_by_freq)}
    grads = {"weight": Spec(weight.shape, weight.dtype)}
    if per_sample_weights is not None:
        grads["per_sample_weights"] = Spec(indices.shape, weight.dtype)
    return Rule({"y": y}, saved if needs else {}, options, grads)


def _check_bags(
    weight: Any, indices: Any, offsets: Any = None, *others: Any, include_last_offset: bool = False, **options: Any
) -> None:
    """Raises LabelError for an index that no row has, ShapeError for offsets that cut no bags."""
    check_indices(weight, indices)
    if offsets is None or 0 in offsets.shape:
        return
    if offsets[0] != 0 or offsets[-1] > indices.shape[0] or (offsets[1:] < offsets[:-1]).any():
        rule = f"0 = offsets[0] ≤ offsets[1] ≤ … ≤ N = {indices.shape[0]}"
        raise ShapeError("offsets", rule, offsets.tolist() if len(offsets) < 9 else f"{len(offsets)} of them")


def _bag_of_each(indices: Any, offsets: Any, bags: int) -> tuple[Any, Any]:
    """(the bag that each index lies in, whether there is one), (N,)."""
    xp = namespace(indices)
    if offsets is None:
        bag = xp.arange(indices.size) // max(indices.shape[1], 1)
        return bag, bag >= 0
    bag = (offsets[None, :] <= xp.arange(indices.shape[0])[:, None]).astype("int64").sum(1) - 1
    inside = (bag >= 0) & (bag < bags)
    return xp.where(inside, bag, xp.zeros_like(bag)), inside


def _taken(weight: Any, indices: Any, offsets: Any, bags: int, padding: int | None) -> tuple[Any, Any, Any, Any]:
    """(indices (N,), the bag of each, whether it belongs there, their rows)."""
    flat = indices.reshape(-1)
    bag, inside = _bag_of_each(indices, offsets, bags)
    inside = inside if padding is None else inside & (flat != padding)
    return flat, bag, inside, None if weight is None else looked_up(weight, flat)


def embedding_bag_forward(
    weight: Any,
    indices: Any,
    offsets: Any = None,
    per_sample_weights: Any = None,
    *,
    needs: tuple = (),
    mode: str = "mean",
    padding_idx: int | None = None,
    include_last_offset: bool = False,
    scale_grad_by_freq: bool = False,
) -> tuple[tuple, dict]:
    """y[b] = the sum, mean or maximum of weight[i] over the indices i of bag b; 0 for an empty one.

    weight: (num_embeddings, embedding_dim), float. indices: (B, L), integers, a bag in each row; or (N,) with offsets (B,):
    where each bag begins, the last ends at N. include_last_offset: offsets is (B + 1,), its last one the end.
    per_sample_weights: of indices' shape and weight's dtype, a factor for each of them (mode "sum"). padding_idx: an index that
    belongs to no bag. scale_grad_by_freq: a row's gradient is divided by how often its index occurs. Where numbers are equal
    the first is the maximum.

    Returns y: (B, embedding_dim), weight's dtype. On the CPU LabelError is raised for an index out of range, and ShapeError
    for offsets that do not ascend from 0; on a GPU such an index makes NaN. As torch.nn.functional.embedding_bag.
    """
    count = indices.shape[0] if offsets is None else offsets.shape[0] - include_last_offset
    flat, bag, inside, rows = _taken(weight, indices, offsets, count, padding_idx)
    xp = namespace(rows)
    y = xp.zeros((count, weight.shape[1]), rows.dtype)
    sizes, winners = xp.zeros((count,), "int64"), xp.full(y.shape, -1, "int64")
    factors = None if per_sample_weights is None else up(per_sample_weights).reshape(-1)
    for i in range(flat.shape[0]):
        at, here, row = bag[i : i + 1], inside[i : i + 1], rows[i : i + 1]
        if mode == "max":
            better = here[:, None] & ((winners[at] < 0) | (row > y[at]))
            y[at], winners[at] = xp.where(better, row, y[at]), xp.where(better, xp.full((), i, "int64"), winners[at])
        else:
            row = row if factors is None else row * factors[i : i + 1, None]
            y[at] += xp.where(here[:, None], row, xp.zeros((), row.dtype))
            sizes[at] += here
    if mode == "mean":
        y /= xp.maximum(sizes, 1).astype(y.dtype)[:, None]
    saved = {"indices": indices} | ({} if offsets is None else {"offsets": offsets})
    if "per_sample_weights" in needs:
        saved["weight"] = weight
    if per_sample_weights is not None and "weight" in needs:
        saved["per_sample_weights"] = per_sample_weights
    if mode != "sum":
        saved |= {"winners": winners} if mode == "max" else {"sizes": sizes}
    return (y.astype(weight.dtype, copy=False),), saved if needs else {}


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
    """dweight[v] = Σ dy[bag] over the indices that are v: by their factor, divided by the bag's size, or where they won;

    dfactor[i] = dy[bag] · weight[index].
    """
    (dy,), indices, offsets = dys, saved["indices"], saved.get("offsets")
    xp, g = namespace(dy), up(dy)
    flat, bag, inside, rows = _taken(saved.get("weight"), indices, offsets, dy.shape[0], padding_idx)
    none = xp.zeros((), g.dtype)
    terms = g[bag] if dy.shape[0] else xp.zeros((flat.shape[0], dy.shape[1]), g.dtype)
    dweight = dfactors = None
    if "per_sample_weights" in needs:
        dfactors = xp.where(inside, (terms * rows).sum(1), none).reshape(indices.shape)
        dfactors = dfactors.astype(inputs[3].dtype, copy=False)
    if "weight" in needs:
        if mode == "max":
            terms = xp.where(saved["winners"][bag] == xp.arange(flat.shape[0])[:, None], terms, none)
        elif mode == "mean":
            terms = terms / xp.maximum(saved["sizes"], 1).astype(compute_dtype(g.dtype))[bag][:, None]
        elif "per_sample_weights" in saved:
            terms = terms * up(saved["per_sample_weights"]).reshape(-1, 1)
        counts = inside & counted(flat, inputs[0].shape[0], padding_idx)
        dweight = gathered(terms, flat, counts, inputs[0], scale_grad_by_freq)
    return dweight, None, None, dfactors


embedding_bag = Op(
    embedding_bag_rule,
    embedding_bag_forward,
    embedding_bag_backward,
    differentiable=("weight", "per_sample_weights"),
    check=_check_bags,
    family="embedding",
)
