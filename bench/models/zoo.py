"""The models that ``gpulayers bench --models`` trains, the most telling first."""

from __future__ import annotations

from collections.abc import Sequence

from gpulayers.bench.models import convnext, efficientnet, gpt, llama, resnet, unet, vit
from gpulayers.bench.models.kind import Kind

_HOMES = {
    "ResNet-50": resnet,
    "GPT-2": gpt,
    "ConvNeXt-T": convnext,
    "U-Net": unet,
    "ViT-S": vit,
    "EfficientNet-B0": efficientnet,
    "Llama-1B": llama,
}
SIZES = ("full", "tiny")


def kinds(size: str, only: Sequence[str] = ()) -> dict[str, Kind]:
    """Models by name, "full" or "tiny"; only: these. Raises ValueError for a name that none has."""
    names = {name.lower(): name for name in _HOMES}
    if unknown := [name for name in only if name.lower() not in names]:
        raise ValueError(f"models: the rule is some of {', '.join(_HOMES)}; got {', '.join(unknown)}")
    chosen = [names[name.lower()] for name in only] or _HOMES
    return {name: getattr(_HOMES[name], size.upper()) for name in chosen}
