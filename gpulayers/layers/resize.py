"""Resizing of sequences, images and volumes."""

from __future__ import annotations

from typing import Any

from gpulayers import arrays
from gpulayers.arrays import Spec
from gpulayers.definition import ArgumentError, RuleError, UnsupportedTypeError
from gpulayers.layers._layer import OpLayer
from gpulayers.ops import resize as ops

_MODES = {"linear": 1, "bilinear": 2, "trilinear": 3, "bicubic": 2}
"""torch's names that say how many axes they are for."""


class Upsample(OpLayer):
    """Any size, larger or smaller: (N, C, *sizes) → (N, C, *size), one to three sizes. As torch.nn.Upsample.

    size: an integer, or one for each axis; or scale_factor: a number, or one for each, sizes times it rounded down.
    mode: "nearest", "nearest-exact", "linear" (sequences), "bilinear" and "bicubic" (images), "trilinear" (volumes),
    "area". align_corners: the corners' centres stay where they are (linear and cubic modes). recompute_scale_factor: pixels
    lie by the ratio of the sizes, not by scale_factor itself.
    """

    op = ops.interpolate
    skips_input_grad = True

    def __init__(
        self,
        size: Any = None,
        scale_factor: Any = None,
        mode: str = "nearest",
        align_corners: bool | None = None,
        recompute_scale_factor: bool | None = None,
    ):
        if (size is None) == (scale_factor is None):
            raise ArgumentError("size", "either size or scale_factor", f"{size} and {scale_factor}")
        if recompute_scale_factor and size is not None:
            raise ArgumentError("recompute_scale_factor", "None or False where size is given", recompute_scale_factor)
        if align_corners is not None and mode not in _MODES:
            raise ArgumentError("align_corners", f"None where mode is not one of {', '.join(_MODES)}", align_corners)
        self.size, self.scale_factor, self.mode = size, scale_factor, mode
        self.align_corners, self.recompute_scale_factor = align_corners, recompute_scale_factor

    def _options(self, sizes: tuple) -> dict[str, Any]:
        """The op's, for an input of these sizes."""
        if (count := _MODES.get(self.mode)) not in (None, len(sizes)):
            raise UnsupportedTypeError("mode", f"one for {len(sizes)} sizes", f"{self.mode!r}, for {count}")
        mode = "linear" if self.mode.endswith("linear") else "cubic" if self.mode == "bicubic" else self.mode
        options = {"mode": mode, "align_corners": bool(self.align_corners)}
        if self.scale_factor is None:
            return {"size": self.size, **options}
        given = self.scale_factor
        scales = tuple(given) if isinstance(given, list | tuple) else (given,) * len(sizes)
        if len(scales) != len(sizes):
            raise ArgumentError("scale_factor", f"a number, or one for each of {len(sizes)} sizes", given)
        size = tuple(None if n is None else int(n * s) for n, s in zip(sizes, scales))
        kept = not self.recompute_scale_factor and self.mode != "area"
        return {"size": size, "scales": scales if kept else (), **options}

    def _sized(self, shape: tuple) -> dict[str, Any]:
        try:
            return self._options(tuple(shape[2:]))
        except RuleError as error:
            error.where = self.name
            raise

    def forward(self, x: Any, **_: Any) -> Any:
        return self.run(self.op, x, **self._sized(x.shape))

    def backward(self, dy: Any, **_: Any) -> Any:
        return self.run_backward(dy)

    def output_shape(self, input_shape: Any, **_: Any) -> tuple:
        try:
            rule = self.op.rule(Spec(tuple(input_shape), arrays.float32), **self._sized(input_shape))
        except RuleError as error:
            error.where = self.name
            raise
        return rule.outputs["y"].shape


class UpsamplingNearest2d(Upsample):
    """The nearest pixel of an image: (N, C, H, W) → (N, C, *size). As torch.nn.UpsamplingNearest2d.

    size: an integer or (height, width); or scale_factor: a number, or two.
    """

    def __init__(self, size: Any = None, scale_factor: Any = None):
        super().__init__(size, scale_factor)


class UpsamplingBilinear2d(Upsample):
    """Between the four nearest pixels, corners on corners: (N, C, H, W) → (N, C, *size). As torch.nn.UpsamplingBilinear2d.

    size: an integer or (height, width); or scale_factor: a number, or two.
    """

    def __init__(self, size: Any = None, scale_factor: Any = None):
        super().__init__(size, scale_factor, "bilinear", True)
