"""Files kept between runs: `GPULAYERS_CACHE`, or `~/.cache/gpulayers`."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def place(folder: str, key: bytes, suffix: str) -> Path:
    """Where the file for `key` lies, if there is one; a hash names it."""
    root = Path(os.environ.get("GPULAYERS_CACHE") or Path.home() / ".cache" / "gpulayers") / folder
    return root / (hashlib.sha256(key).hexdigest()[:32] + suffix)


def keep(path: Path, make: Callable[[Path], None]) -> None:
    """Put a file there, made by `make(path)`. Safe among processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        new = Path(scratch) / path.name
        make(new)
        os.replace(new, path)


def cached(folder: str, key: bytes, suffix: str, make: Callable[[Path], None]) -> Path:
    """The file for `key`, made by `make(path)` if it isn't there yet."""
    path = place(folder, key, suffix)
    if not path.exists():
        keep(path, make)
    return path
