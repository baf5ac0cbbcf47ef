"""Windows of images as columns, and back; pixels to channels, and back; channels dealt out anew."""

from __future__ import annotations

from typing import Any

from gpulayers.layers._layer import OpLayer
from gpulayers.ops import window as ops


class Unfold(OpLayer):
    """Windows as columns: (N, C, H, W) → (N, C · kh · kw, windows). As torch.nn.Unfold."""

    op = ops.unfold

    def __init__(self, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1):
        self.kernel_size, self.dilation, self.padding, self.stride = kernel_size, dilation, padding, stride

    def options(self) -> dict[str, Any]:
        names = "kernel_size", "dilation", "padding", "stride"
        return {name: getattr(self, name) for name in names}


class Fold(OpLayer):
    """Columns added where their windows lie: (N, C · kh · kw, windows) → (N, C, *output_size). As torch.nn.Fold."""

    op = ops.fold

    def __init__(self, output_size: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1):
        self.output_size, self.kernel_size = output_size, kernel_size
        self.dilation, self.padding, self.stride = dilation, padding, stride

    def options(self) -> dict[str, Any]:
        names = "output_size", "kernel_size", "dilation", "padding", "stride"
        return {name: getattr(self, name) for name in names}


class PixelShuffle(OpLayer):
    """Channels to pixels: (N, C · r², H, W) → (N, C, H · r, W · r), r = upscale_factor. As torch.nn.PixelShuffle."""

    op = ops.pixel_shuffle

    def __init__(self, upscale_factor: int):
        self.upscale_factor = upscale_factor

    def options(self) -> dict[str, Any]:
        return {"upscale_factor": self.upscale_factor}


class PixelUnshuffle(OpLayer):
    """Pixels to channels: (N, C, H · r, W · r) → (N, C · r², H, W), r = downscale_factor. As torch.nn.PixelUnshuffle."""

    op = ops.pixel_unshuffle

    def __init__(self, downscale_factor: int):
        self.downscale_factor = downscale_factor

    def options(self) -> dict[str, Any]:
        return {"downscale_factor": self.downscale_factor}


class ChannelShuffle(OpLayer):
    """Each group's first channel, then each one's second, …: (N, C, *sizes), as it was. As torch.nn.ChannelShuffle."""

    op = ops.channel_shuffle

    def __init__(self, groups: int):
        self.groups = groups

    def options(self) -> dict[str, Any]:
        return {"groups": self.groups}
