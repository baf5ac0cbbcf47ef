"""A file that is written whole or not at all, and where files are kept between runs."""

from __future__ import annotations

import os
import pathlib


def write_whole(path: pathlib.Path, data: bytes) -> None:
    """``path`` holds ``data``, or, whenever the process dies or the disk is full, what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def cache(name: str) -> pathlib.Path:
    """The folder of this name in GPULAYERS_CACHE, by default ~/.cache/gpulayers; it need not be there."""
    return pathlib.Path(os.environ.get("GPULAYERS_CACHE") or pathlib.Path.home() / ".cache" / "gpulayers") / name
