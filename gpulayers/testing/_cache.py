"""Files kept between runs: `GPULAYERS_CACHE`, or `~/.cache/gpulayers`."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cached(folder: str, key: bytes, suffix: str, make: Callable[[Path], None]) -> Path:
    """The file for `key` (a hash names it), made by `make(path)` if it isn't there yet. Safe among processes."""
    root = Path(os.environ.get("GPULAYERS_CACHE") or Path.home() / ".cache" / "gpulayers") / folder
    path = root / (hashlib.sha256(key).hexdigest()[:32] + suffix)
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            new = Path(scratch) / path.name
            make(new)
            os.replace(new, path)
    return path
