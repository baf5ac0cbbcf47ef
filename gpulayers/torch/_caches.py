"""Caches of keys and values that are tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gpulayers.layers import _caches
from gpulayers.torch.attention import attention_decode, kv_append, rotary_append


class _OfTensors:
    """What torch has otherwise."""

    dtype: Any
    device: Any

    def _zeros(self, shape: tuple) -> torch.Tensor:
        kind = getattr(torch, self.dtype) if isinstance(self.dtype, str) else self.dtype
        return torch.zeros(shape, dtype=kind, device=self.device)

    def _put(self, host: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(host).to(self.device)

    @staticmethod
    def _attended(q: Any, k: Any, v: Any, lengths: Any, table: Any, sinks: Any, **options: Any) -> torch.Tensor:
        return attention_decode(q, k, v, lengths, table, sinks=sinks, **options)

    @staticmethod
    def _appended(*given: Any) -> None:
        kv_append(*given)

    @staticmethod
    def _turned_and_appended(*given: Any, interleaved: bool) -> torch.Tensor:
        return rotary_append(*given, interleaved=interleaved)


class KVCache(_OfTensors, _caches.KVCache):
    """``gpulayers.KVCache`` of tensors: dtype is a torch.dtype or its name, device what torch takes."""


class PagedKVCache(_OfTensors, _caches.PagedKVCache):
    """``gpulayers.PagedKVCache`` of tensors: dtype is a torch.dtype or its name, device what torch takes."""
