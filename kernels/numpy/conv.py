"""Convolution over one to three spatial axes, and transposed: three roles (forward, dx, dweight) over images.

A sequence is an image of one column. Volumes are sliced into images, ``_conv_volumes.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpulayers.arrays import Spec, arranged, compute_dtype, empty_numpy, float64, spec

from .._conv import conv_saved
from .._window import Window, output_order
from . import _blocks, _conv_images, _conv_volumes
from ._conv import Options
from ._epilogue import Epilogue, before, epilogue

REFUSALS = {"float64": "float64 is left to the definition"}


def _image(x: np.ndarray) -> np.ndarray:
    """A sequence as an image of one column, a view: blocks of images are cut between rows."""
    return x[..., None] if x.ndim == 3 else x


def _options(stride: tuple, padding: tuple, dilation: tuple, groups: int) -> Options:
    if len(stride) == 1:
        stride, padding, dilation = (*stride, 1), (*padding, (0, 0)), (*dilation, 1)
    return Options(stride, padding, dilation, groups)


def _by(x: Any) -> Any:
    return _conv_volumes if x.ndim == 5 else _conv_images


def _forward(x: np.ndarray, weight: np.ndarray, end: Epilogue, y: np.ndarray, how: Options) -> None:
    _by(x).forward(_image(x), _image(weight), end.viewed(_image), _image(y), how)


def _input_gradient(dy: np.ndarray, weight: np.ndarray, dx: np.ndarray, how: Options) -> None:
    _by(dy).input_gradient(_image(dy), _image(weight), _image(dx), how)


def _weight_gradient(dy: np.ndarray, x: np.ndarray, weight: Spec, how: Options) -> np.ndarray:
    shape = (*weight.shape, 1) if x.ndim == 3 else weight.shape
    total = _by(x).weight_gradient(_image(dy), _image(x), Spec(shape, compute_dtype(x.dtype)), how)
    return arranged(total.reshape(weight.shape).astype(weight.dtype, copy=False), weight.like().order)


def _bias_gradient(dy: np.ndarray, bias: Spec) -> np.ndarray:
    return dy.sum((0, *range(2, dy.ndim)), dtype=compute_dtype(dy.dtype)).astype(bias.dtype, copy=False)


def conv_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    scale: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    front, behind = zip(*padding)
    size = Window(tuple(weight.shape[2:]), stride, front, dilation).output_size(x.shape[2:], behind)
    y = empty_numpy(Spec((len(x), len(weight), *size), x.dtype, output_order(spec(x))))
    end = epilogue(y, needs, bias, scale, residual, activation)
    _forward(x, weight, end, y, _options(stride, padding, dilation, groups))
    return (y,), conv_saved(needs, activation, y, end.z, x, weight, bias, scale, residual)


def conv_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
) -> tuple:
    (x, weight, bias, _, residual), how = inputs, _options(stride, padding, dilation, groups)
    dx = dweight = dbias = dresidual = None
    dz = before(dys[0], saved, activation)
    if "residual" in needs:
        dresidual = empty_numpy(Spec(residual.shape, residual.dtype, output_order(x)))
        dresidual[...] = dz
    if "bias" in needs:
        dbias = _bias_gradient(dz, bias)
    if "scale" in saved:
        dz = dz * saved["scale"].astype(np.float32, copy=False).reshape(-1, *(1,) * (dz.ndim - 2))
    if "x" in needs:
        dx = _input_gradient_of(dz, saved["weight"], x, how, *dys[1:])
    if "weight" in needs:
        dweight = _weight_gradient(dz, saved["x"], weight, how)
    return dx, dweight, dbias, None, dresidual


def _input_gradient_of(dz: np.ndarray, weight: np.ndarray, x: Spec, how: Options, other: Any = None) -> np.ndarray:
    """dx; other: what is added to it, in the dtype that sums are in."""
    dx = empty_numpy(x.like() if other is None else x.like()._replace(dtype=compute_dtype(x.dtype)))
    _input_gradient(dz, weight, dx, how)
    if other is not None:
        dx += other
    return dx.astype(x.dtype, copy=False)


def conv_transpose_forward(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    *,
    needs: tuple = (),
    stride: tuple,
    padding: tuple,
    output_padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
) -> tuple[tuple, dict]:
    front, behind = zip(*padding)
    reach = Window(tuple(weight.shape[2:]), stride, front, dilation).reach(x.shape[2:])
    size = [r - b - a + m for r, b, a, m in zip(reach, front, behind, output_padding)]
    y = empty_numpy(Spec((len(x), weight.shape[1] * groups, *size), compute_dtype(x.dtype), output_order(spec(x))))
    _input_gradient(x, weight, y, _options(stride, padding, dilation, groups))
    end = epilogue(y, needs, bias, None, None, activation)
    end.scaled(y.swapaxes(0, 1))
    end.added(y, ())
    end.activated(_blocks.flat(y))
    y, z = (None if a is None else a.astype(x.dtype, copy=False) for a in (y, end.z))
    return (y,), conv_saved(needs, activation, y, z, x, weight, bias)


def conv_transpose_backward(
    dys: tuple,
    saved: dict,
    *,
    inputs: tuple,
    needs: tuple,
    stride: tuple,
    padding: tuple,
    output_padding: tuple,
    dilation: tuple,
    groups: int,
    activation: str | None = None,
) -> tuple:
    (x, weight, bias), how = inputs, _options(stride, padding, dilation, groups)
    dx = dweight = None
    dz = before(dys[0], saved, activation)
    if "x" in needs:
        dx = empty_numpy(x.like())
        _forward(dz, saved["weight"], Epilogue(), dx, how)
    if "weight" in needs:
        dweight = _weight_gradient(saved["x"], dz, weight, how)
    return dx, dweight, _bias_gradient(dz, bias) if "bias" in needs else None


def conv_refuses(x: Spec, *others: Spec | None, needs: tuple, **options: Any) -> str | None:
    return REFUSALS["float64"] if x.dtype == float64 else None


conv_transpose_refuses = conv_refuses
