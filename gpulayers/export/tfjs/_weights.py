"""Weight files: little-endian numbers, one array behind the other, cut into files wherever one is full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

SHARD = 4 * 2**20
"""Bytes a file: browsers keep files of this size."""


def shards(values: Mapping[str, np.ndarray]) -> tuple[list[dict[str, Any]], dict[str, bytes]]:
    """(model.json's "weightsManifest", the files by name) for float32 and int32 arrays by "layer/name"."""
    if not values:
        return [], {}
    data = b"".join(np.ascontiguousarray(v, v.dtype.newbyteorder("<")).tobytes() for v in values.values())
    count = max(1, -(-len(data) // SHARD))
    files = {f"group1-shard{i + 1}of{count}.bin": data[i * SHARD : (i + 1) * SHARD] for i in range(count)}
    specs = [{"name": name, "shape": list(v.shape), "dtype": str(v.dtype)} for name, v in values.items()]
    return [{"paths": list(files), "weights": specs}], files
