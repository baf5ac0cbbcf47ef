"""Windows as columns and shuffled pixels: patch embeddings, super-resolution, detection necks, ShuffleNet."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F

from gpulayers.ops.window import channel_shuffle, fold, pixel_shuffle, pixel_unshuffle, unfold

from .cases.case import CHANNELS_LAST, ONE_ARCH, Case


def _case(op: Any, name: str, shape: tuple, cpu: bool, **options: Any) -> Case:
    function: Any = getattr(F, op.name)

    def theirs(x: Any) -> Any:
        return function(x, **options)

    headline = name == "3×3 windows" and op is unfold and not cpu
    title = f"{name}, {'×'.join(map(str, shape))}"
    return Case(op, title, (shape,), options, theirs, cpu=cpu, headline=headline)


def _cases(n: int, cpu: bool) -> list[Case]:
    three: dict[str, Any] = {"kernel_size": 3, "padding": 1}
    return [
        _case(unfold, "3×3 windows", (n, 64, 56, 56), cpu, **three),
        _case(unfold, "ViT's patches of 16²", (n, 3, 224, 224), cpu, kernel_size=16, stride=16),
        _case(fold, "3×3 windows", (n, 576, 56 * 56), cpu, output_size=56, **three),
        _case(fold, "patches of 16²", (n, 768, 14 * 14), cpu, output_size=224, kernel_size=16, stride=16),
        _case(pixel_shuffle, "ESPCN's last, 2×", (n, 256, 64, 64), cpu, upscale_factor=2),
        _case(pixel_unshuffle, "YOLO's focus, 2×", (n, 64, 128, 128), cpu, downscale_factor=2),
        _case(channel_shuffle, "ShuffleNet's", (n, 240, 28, 28), cpu, groups=3),
    ]


def cases() -> list[Case]:
    return [*_cases(4, cpu=True), *_cases(64, cpu=False)]


def audits() -> list[Case]:
    unfolded, _, _, _, shuffled, _, dealt = _cases(64, cpu=False)
    last = {"order": CHANNELS_LAST, "archs": ONE_ARCH}
    return [unfolded, shuffled, dealt, unfolded._replace(**last), shuffled._replace(**last)]
