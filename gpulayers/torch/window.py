"""Windows of images as columns, and back; pixels to channels, and back: torch.nn's classes and functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from gpulayers.ops import window as ops
from gpulayers.torch._arguments import batched, pair
from gpulayers.torch._op import TorchOp

Size = int | Sequence[int]

_unfold = TorchOp(ops.unfold, F.unfold, "int[] kernel_size, int[] dilation, int[] padding, int[] stride")
_fold = TorchOp(
    ops.fold, F.fold, "SymInt[] output_size, int[] kernel_size, int[] dilation, int[] padding, int[] stride"
)
_pixel_shuffle = TorchOp(ops.pixel_shuffle, F.pixel_shuffle, "int upscale_factor")
_pixel_unshuffle = TorchOp(ops.pixel_unshuffle, F.pixel_unshuffle, "int downscale_factor")
_channel_shuffle = TorchOp(ops.channel_shuffle, F.channel_shuffle, "int groups")


def unfold(input: Tensor, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1) -> Tensor:
    """As ``torch.nn.functional.unfold``: input (N, C, H, W) or (C, H, W)."""
    return batched(_unfold, 4, input, pair(kernel_size), pair(dilation), pair(padding), pair(stride))


def fold(
    input: Tensor, output_size: Size, kernel_size: Size, dilation: Size = 1, padding: Size = 0, stride: Size = 1
) -> Tensor:
    """As ``torch.nn.functional.fold``: input (N, C · kh · kw, windows) or (C · kh · kw, windows)."""
    options = pair(output_size), pair(kernel_size), pair(dilation), pair(padding), pair(stride)
    return batched(_fold, 3, input, *options)


def _of_images(function: TorchOp, input: Tensor, factor: int) -> Tensor:
    """function(input, factor), input (*, C, H, W)."""
    if not isinstance(input, Tensor) or input.dim() <= 4:
        return batched(function, 4, input, factor)
    return function(input.flatten(0, -4), factor).unflatten(0, input.shape[:-3])


def pixel_shuffle(input: Tensor, upscale_factor: int) -> Tensor:
    """As ``torch.nn.functional.pixel_shuffle``: input (*, C · r², H, W), r = upscale_factor."""
    return _of_images(_pixel_shuffle, input, upscale_factor)


def pixel_unshuffle(input: Tensor, downscale_factor: int) -> Tensor:
    """As ``torch.nn.functional.pixel_unshuffle``: input (*, C, H · r, W · r), r = downscale_factor."""
    return _of_images(_pixel_unshuffle, input, downscale_factor)


def channel_shuffle(input: Tensor, groups: int) -> Tensor:
    """As ``torch.nn.functional.channel_shuffle``: input (N, C, *)."""
    return _channel_shuffle(input, groups)


class Unfold(nn.Unfold):
    """``torch.nn.Unfold`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return unfold(input, self.kernel_size, self.dilation, self.padding, self.stride)


class Fold(nn.Fold):
    """``torch.nn.Fold`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return fold(input, self.output_size, self.kernel_size, self.dilation, self.padding, self.stride)


class PixelShuffle(nn.PixelShuffle):
    """``torch.nn.PixelShuffle`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return pixel_shuffle(input, self.upscale_factor)


class PixelUnshuffle(nn.PixelUnshuffle):
    """``torch.nn.PixelUnshuffle`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return pixel_unshuffle(input, self.downscale_factor)


class ChannelShuffle(nn.ChannelShuffle):
    """``torch.nn.ChannelShuffle`` over gpulayers' kernels."""

    def forward(self, input: Tensor) -> Tensor:
        return channel_shuffle(input, self.groups)
