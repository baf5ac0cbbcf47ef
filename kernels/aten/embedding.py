"""Embeddings by torch."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec

from ._tensors import FLOAT32, plainly, refusal

REFUSALS = {"dtype": FLOAT32}


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
