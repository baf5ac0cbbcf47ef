"""Attention and rotary positions as nodes of ONNX: its own Attention, and with a window, which that lacks, a softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpulayers.export.onnx._graph import ATTENTION, ModelGraph, Tensor
from gpulayers.layers import attention, rotary
from gpulayers.layers._calls import each_shape
from gpulayers.ops._attention import allowed

Linear = Callable[[ModelGraph, Any, Tensor], str | None]


def nodes_of(linear: Linear) -> dict[type, Callable[[ModelGraph, Any, Tensor], str | None]]:
    """linear: what writes a product with weights."""

    def attend(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
        return _attention(graph, layer, x, linear)

    return {attention.MultiHeadAttention: attend, rotary.RotaryEmbedding: _rotary}


def _attention(graph: ModelGraph, layer: Any, x: Tensor, linear: Linear) -> str | None:
    write = _whole if tuple(layer.window) == (-1, -1) else _parts
    y = write(graph, layer, x, linear)
    return y and linear(graph, layer.out, Tensor(y, each_shape(layer.output_shape(x.shape))[0]))


def _whole(graph: ModelGraph, layer: Any, x: Tensor, linear: Linear) -> str:
    """Of tokens in any number."""
    graph.opset = ATTENTION
    heads, width = layer.num_heads, layer.embed_dim // layer.num_heads
    groups = layer.num_kv_heads or heads
    sizes = graph.constant([heads * width, groups * width, groups * width])
    qkv = graph.op("Split", linear(graph, layer.qkv, x) or "", sizes, outputs=3, axis=2)
    scale = 1 / math.sqrt(width) if layer.scale is None else layer.scale
    how = dict(q_num_heads=heads, kv_num_heads=groups, is_causal=int(layer.causal))
    return graph.op("Attention", *qkv, **how, scale=float(scale), softcap=float(layer.softcap))


def _parts(graph: ModelGraph, layer: Any, x: Tensor, linear: Linear) -> str | None:
    length = x.shape[1]
    if length is None:
        return None
    heads, width = layer.num_heads, layer.embed_dim // layer.num_heads
    groups = layer.num_kv_heads or heads
    joint = linear(graph, layer.qkv, x) or ""
    joint = graph.op("Reshape", joint, graph.constant([0, length, heads + 2 * groups, width]))
    joint = graph.op("Transpose", joint, perm=[0, 2, 1, 3])
    q, k, v = graph.op("Split", joint, graph.constant([heads, groups, groups]), outputs=3, axis=1)
    scale = 1 / math.sqrt(width) if layer.scale is None else layer.scale
    q = graph.op("Mul", q, graph.constant(scale, "f"))
    share = heads // groups  # the heads that share a head of k stand below each other
    q = graph.op("Reshape", q, graph.constant([0, groups, share * length, width]))
    s = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
    if layer.softcap:
        cap = graph.constant(layer.softcap, "f")
        s = graph.op("Mul", graph.op("Tanh", graph.op("Div", s, cap)), cap)
    left, right = layer.window
    seen = allowed(np, length, length, (left, 0 if layer.causal else right), "top_left", None, None)
    if seen is not None:
        hidden = np.where(seen, np.float32(0), np.float32(-np.inf))
        s = graph.op("Add", s, graph.constant(np.tile(hidden, (share, 1)), "f"))
    y = graph.op("MatMul", graph.op("Softmax", s, axis=-1), v)
    y = graph.op("Reshape", y, graph.constant([0, heads, length, width]))
    y = graph.op("Transpose", y, perm=[0, 2, 1, 3])
    return graph.op("Reshape", y, graph.constant([0, length, layer.embed_dim]))


def _rotary(graph: ModelGraph, layer: Any, x: Tensor) -> str | None:
    _, heads, length, width = x.shape
    if None in (heads, length, width):
        return None
    pairs, rest = layer.dim // 2, width - layer.dim
    ends = graph.constant([0]), graph.constant([length]), graph.constant([0])
    cos, sin = (graph.op("Slice", graph.weight(layer, w), *ends) for w in (layer.cos, layer.sin))
    turned, left = x.name, []
    if rest:
        turned, *left = graph.op("Split", x.name, graph.constant([layer.dim, rest]), outputs=2, axis=3)
    if layer.interleaved:
        turned = graph.op("Reshape", turned, graph.constant([0, heads, length, pairs, 2]))
        parts = graph.op("Split", turned, outputs=2, axis=4, num_outputs=2)
        a, b = (graph.op("Squeeze", part, graph.constant([4])) for part in parts)
    else:
        a, b = graph.op("Split", turned, outputs=2, axis=3, num_outputs=2)
    c = graph.op("Sub", graph.op("Mul", a, cos), graph.op("Mul", b, sin))
    d = graph.op("Add", graph.op("Mul", b, cos), graph.op("Mul", a, sin))
    if not layer.interleaved:
        return graph.op("Concat", c, d, *left, axis=3)
    both = [graph.op("Unsqueeze", part, graph.constant([4])) for part in (c, d)]
    y = graph.op("Reshape", graph.op("Concat", *both, axis=4), graph.constant([0, heads, length, layer.dim]))
    return graph.op("Concat", y, *left, axis=3) if left else y
