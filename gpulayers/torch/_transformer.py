"""``torch.nn``'s Transformer and its parts: torch's own modules, whose layers are gpulayers'."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules import transformer as torchs

from gpulayers.torch._lowered import lowered
from gpulayers.torch._multihead import MultiheadAttention
from gpulayers.torch._sums import add_at_end, add_norm
from gpulayers.torch.activation import gelu, relu
from gpulayers.torch.dropout import Dropout
from gpulayers.torch.linear import Linear
from gpulayers.torch.norm import LayerNorm

_LEAF = nn.Module.__module__
_ACTIVATIONS = {F.relu: relu, F.gelu: gelu}


class _OverOurs:
    """A module whose ``__init__`` makes torch's layers: they become gpulayers'."""

    def __init__(self, *args: Any, **named: Any):
        super().__init__(*args, **named)
        for module in self.modules():  # type: ignore[attr-defined]
            if (ours := _OURS.get(type(module))) is not None:
                module.__class__ = ours
                vars(module)["__module__"] = _LEAF


class _FeedForward:
    """Its activation, where that is torch's function, is gpulayers'."""

    def _ff_block(self, x: Tensor) -> Tensor:
        m: Any = self
        activation = _ACTIVATIONS.get(m.activation, m.activation)
        found = m.linear2(m.dropout(activation(m.linear1(x))))
        last = m.dropout2 if isinstance(m, nn.TransformerEncoderLayer) else m.dropout3
        return last(found)


class TransformerEncoderLayer(_FeedForward, _OverOurs, nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` over gpulayers' kernels, in evaluation too: torch's fused path is left alone."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        block = (src_mask, src_key_padding_mask, is_causal)
        if self.norm_first:
            found = self._sa_block(_read(self.norm1, src, self.self_attn, *block[:2]), *block)
            y, x = add_norm(self.norm2, found, src, (self.linear1,))
            return add_at_end(self, self._ff_block(y), x)
        x = add_norm(self.norm1, self._sa_block(src, *block), src)[0]
        return add_norm(self.norm2, self._ff_block(x), x)[0]


class TransformerDecoderLayer(_FeedForward, _OverOurs, nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` over gpulayers' kernels."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        own = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
        other = (memory_mask, memory_key_padding_mask, memory_is_causal)
        if self.norm_first:
            found = self._sa_block(_read(self.norm1, tgt, self.self_attn, *own[:2]), *own)
            y, x = add_norm(self.norm2, found, tgt)
            y, x = add_norm(self.norm3, self._mha_block(y, memory, *other), x, (self.linear1,))
            return add_at_end(self, self._ff_block(y), x)
        x = add_norm(self.norm1, self._sa_block(tgt, *own), tgt)[0]
        x = add_norm(self.norm2, self._mha_block(x, memory, *other), x)[0]
        return add_norm(self.norm3, self._ff_block(x), x)[0]


def _read(norm: Any, x: Tensor, attention: Any, *masks: Tensor | None) -> Tensor:
    """norm(x) for queries, keys and values of one attention: in the 16 bits that their product takes, unless a mask of
    numbers must have its dtype."""
    if type(attention) is not MultiheadAttention or any([m is not None and m.is_floating_point() for m in masks]):
        return norm(x)
    return lowered(norm, (attention,), x)


class TransformerEncoder(nn.TransformerEncoder):
    """``torch.nn.TransformerEncoder``: in evaluation too it keeps padding as it is, where torch's fused path gives zeros."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        first = self.layers[0].self_attn.batch_first if len(self.layers) else False
        causal = torchs._detect_is_causal_mask(mask, is_causal, torchs._get_seq_len(src, first))
        for layer in self.layers:
            src = layer(src, src_mask=mask, is_causal=causal, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


class TransformerDecoder(nn.TransformerDecoder):
    """``torch.nn.TransformerDecoder``: its layers are copies of the one that it is given."""


class Transformer(_OverOurs, nn.Transformer):
    """``torch.nn.Transformer`` over gpulayers' kernels."""


_OURS: dict[type, type] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
    nn.Linear: Linear,
    nn.Dropout: Dropout,
    nn.LayerNorm: LayerNorm,
}
