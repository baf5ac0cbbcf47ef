"""What a GPU measured of a layer's kernels (``gpulayers tune FILE.py:Class``), kept on disk: what forward keeps for backward,
and tiles. Where nothing was measured, counted bytes choose; a call itself measures nothing, so that its bits stay."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from gpulayers._files import cache, write_whole
from gpulayers.fusing._launch import Tile

_KEYS: dict[str, Any] = {"saving": str, "date": str, "gain": (int, float), "forward": dict, "backward": dict}


class Choice(NamedTuple):
    """saving: the name of a way to divide the work (``Programs.ways``). forward, backward: {size class: tile}."""

    saving: str
    forward: Mapping[int, Tile] = {}
    backward: Mapping[int, Tile] = {}
    gpu: str = ""
    date: str = ""
    gain: float = 1.0
    """How many times as fast it is as what counted bytes chose, forward and backward together."""

    def said(self) -> str:
        """A line for the file."""
        if not self.gpu:
            return ""
        return f"Measured on {self.gpu}, {self.date}: {self.gain:.2f} times as fast as what counted bytes chose."


def gpu() -> str | None:
    """The name of the current GPU; None where there is none."""
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def path_of(key: str) -> pathlib.Path:
    """key: of the kernels as counted bytes chose them."""
    return cache("fused") / f"{key}.json"


def read(key: str) -> Choice | None:
    """What this GPU measured of these kernels. Raises ValueError, with the file's name, for a broken one."""
    path = path_of(key)
    if not path.is_file() or (name := gpu()) is None:
        return None
    found = _loaded(path).get(name)
    if found is None:
        return None
    if not isinstance(found, dict) or any(not isinstance(found.get(k), kind) for k, kind in _KEYS.items()):
        raise ValueError(f"{path}: {name}: the rule is {', '.join(_KEYS)}; got {found!r:.200}")
    forward, backward = ({int(size): Tile(*tile) for size, tile in found[w].items()} for w in ("forward", "backward"))
    return Choice(found["saving"], forward, backward, name, found["date"], float(found["gain"]))


def write(key: str, choice: Choice) -> pathlib.Path:
    """Keep it, beside what other GPUs measured."""
    path = path_of(key)
    found = _loaded(path) if path.is_file() else {}
    tiles = {
        way: {str(size): list(tile) for size, tile in getattr(choice, way).items()} for way in ("forward", "backward")
    }
    found[choice.gpu] = {"saving": choice.saving, "date": choice.date, "gain": choice.gain, **tiles}
    write_whole(path, json.dumps(found, indent=1).encode())
    return path


def _loaded(path: pathlib.Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the rule is a JSON file, as gpulayers tune writes it: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: the rule is an object with the names of GPUs; got {found!r:.200}")
    return found
