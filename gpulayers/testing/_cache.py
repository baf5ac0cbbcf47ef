"""Files kept between runs, each under a hash of what it was made from."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from gpulayers import _files


def place(folder: str, key: bytes, suffix: str) -> Path:
    """Where the file for `key` lies, if there is one; a hash names it."""
    return _files.cache(folder) / (hashlib.sha256(key).hexdigest()[:32] + suffix)


def keep(path: Path, make: Callable[[Path], object]) -> None:
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
