"""ReLU and GELU by torch. What its vectors do with NaN in the gradients of others is not what its CUDA kernels do."""

from __future__ import annotations

from typing import Any

import torch

from gpulayers.arrays import Spec

from ._tensors import FLOAT32, arranged, order_of, plainly, refusal

REFUSALS = {"dtype": FLOAT32}
_aten = torch.ops.aten


def relu_refuses(x: Spec, *, needs: tuple = ()) -> str | None:
    return refusal(x)


def relu_forward(x: torch.Tensor, *, needs: tuple = ()) -> tuple[tuple, dict]:
    y = arranged(plainly(torch.relu, x), order_of(x))
    return (y,), {"y": y} if needs else {}


def relu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple) -> tuple:
    dx = plainly(_aten.threshold_backward, dys[0], saved["y"], 0)
    return (arranged(dx, inputs[0].like().order),)


def gelu_refuses(x: Spec, *, needs: tuple = (), **options: Any) -> str | None:
    return refusal(x)


def gelu_forward(x: torch.Tensor, *, needs: tuple = (), approximate: str = "none") -> tuple[tuple, dict]:
    y = plainly(_gelu, x, approximate)
    return (arranged(y, order_of(x)),), {"x": x} if needs else {}


def _gelu(x: torch.Tensor, approximate: str) -> torch.Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate)


def gelu_backward(dys: tuple, saved: dict, *, inputs: tuple, needs: tuple, approximate: str = "none") -> tuple:
    dx = plainly(_gradient, dys[0], saved["x"], approximate)
    return (arranged(dx, inputs[0].like().order),)


def _gradient(dy: torch.Tensor, x: torch.Tensor, approximate: str) -> torch.Tensor:
    return _aten.gelu_backward(dy, x, approximate=approximate)
