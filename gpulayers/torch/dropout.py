"""Dropout. The seed is drawn from torch's generator of the input's device, so activation checkpointing replays the mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.kernels._dropout import draws
from gpulayers.ops import dropout as ops
from gpulayers.torch._inplace import InPlace
from gpulayers.torch._op import TorchOp


def _feature_dropout(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    return (torch.feature_dropout_ if inplace else torch.feature_dropout)(x, p, training)


def _feature_dropout_of_one(x: Tensor, p: float, training: bool, inplace: bool) -> Tensor:
    """Of one sample alone, [C, …]."""
    y = _feature_dropout(x.unsqueeze(0), p, training, inplace)
    return x if inplace else y.squeeze(0)


_TWINS: dict[tuple[bool, int], Callable] = {
    (False, 0): F.dropout,
    (False, 1): _feature_dropout_of_one,
    (False, 2): _feature_dropout,
    (True, 0): F.alpha_dropout,
    (True, 2): F.feature_alpha_dropout,
}
"""By alpha and features."""


def _dropout_twin(
    x: Tensor, seed: Tensor, p: float, alpha: bool = False, features: int = 0, inplace: bool = False
) -> Tensor:
    return _TWINS[alpha, features](x, p, True, inplace)


def _dropout_again(dys: Sequence[Any], saved: dict, inputs: tuple, options: dict) -> list:
    (dy,) = dys
    p, alpha, features = (options[k] for k in ("p", "alpha", "features"))
    ones = torch.ones(inputs[0].shape, dtype=torch.promote_types(dy.dtype, torch.float32), device=dy.device)
    # The library's op draws the mask by the seed whatever dy is: batched, dual.
    mask = _dropout.library((ones, saved["seed"], p, False, features), False)
    if alpha:
        mask = (mask > 0) * draws(p, True)[1]
    return [(dy * mask).to(dy.dtype), None]


_dropout = TorchOp(ops.dropout, _dropout_twin, "float p, bool alpha, int features", again=_dropout_again)
_dropout.in_place = InPlace(_dropout)


def draw_seed(like: Tensor) -> Tensor:
    """[seed, offset] from torch's generator, on the device of ``like``; the host waits for nothing."""
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=like.device)


def _drop(twin: Callable, input: Tensor, p: float, training: bool, inplace: bool, alpha: bool, features: int) -> Tensor:
    if p < 0.0 or p > 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if not isinstance(input, Tensor):
        return twin(input, p, training, inplace)  # raises, or records itself
    if not training or p == 0.0:  # as torch, which draws nothing then and leaves an input in place as it is
        return input
    return (_dropout.in_place if inplace else _dropout)(input, draw_seed(input), p, alpha, features)


def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.dropout``; the mask is Philox's, the same on every device for the same seed."""
    return _drop(F.dropout, input, p, training, inplace, False, 0)


def alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.alpha_dropout``; the mask is Philox's."""
    return _drop(F.alpha_dropout, input, p, training, inplace, True, 0)


def feature_alpha_dropout(input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:
    """As ``torch.nn.functional.feature_alpha_dropout``; the mask is Philox's. input: (N, C, …)."""
    return _drop(F.feature_alpha_dropout, input, p, training, inplace, True, 2)


def _by_feature(axes: int) -> Callable[..., Tensor]:
    twin: Any = getattr(F, f"dropout{axes}d")

    def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        ndim = input.ndim if isinstance(input, Tensor) else 0
        if ndim == axes + 2 or (ndim == axes + 1 and axes != 2):  # [C, H, W] torch takes for something else
            return _drop(twin, input, p, training, inplace, False, ndim - axes)
        return twin(input, p, training, inplace)  # raises, warns, or records itself

    drop.__name__ = drop.__qualname__ = twin.__name__
    drop.__doc__ = f"As ``torch.nn.functional.{twin.__name__}``; the mask is Philox's."
    return drop


dropout1d, dropout2d, dropout3d = (_by_feature(axes) for axes in (1, 2, 3))


class Dropout(nn.Dropout):
    """``torch.nn.Dropout`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, self.training, self.inplace)


class Dropout1d(nn.Dropout1d):
    """``torch.nn.Dropout1d`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout1d(input, self.p, self.training, self.inplace)


class Dropout2d(nn.Dropout2d):
    """``torch.nn.Dropout2d`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout2d(input, self.p, self.training, self.inplace)


class Dropout3d(nn.Dropout3d):
    """``torch.nn.Dropout3d`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout3d(input, self.p, self.training, self.inplace)


class AlphaDropout(nn.AlphaDropout):
    """``torch.nn.AlphaDropout`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return alpha_dropout(input, self.p, self.training, self.inplace)


class FeatureAlphaDropout(nn.FeatureAlphaDropout):
    """``torch.nn.FeatureAlphaDropout`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return feature_alpha_dropout(input, self.p, self.training, self.inplace)
