"""Rows of a table looked up by indices: one for each index, or sums, means and maxima over bags of them."""

from __future__ import annotations

from typing import Any

from gpulayers.arrays import Spec, namespace, up
from gpulayers.definition import Rule
from gpulayers.ops._embedding import check_indices, counted, gathered, looked_up, require_table, row_of_padding
from gpulayers.ops._embedding_bag import embedding_bag as embedding_bag
from gpulayers.ops._embedding_bag import embedding_bag_backward as embedding_bag_backward
from gpulayers.ops._embedding_bag import embedding_bag_forward as embedding_bag_forward
from gpulayers.ops._one_hot import one_hot as one_hot
from gpulayers.ops._op import Op


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
