"""Recurrent layers: the steps of one layer in one direction, behind the product of their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gpulayers.ops.recurrent import GATES, recurrent

from .cases.case import ONE_ARCH, Case, Labels


def _theirs(mode: str) -> Callable[..., Any]:
    """torch's own layer, which multiplies the inputs itself: here with the identity, a product more than ours."""

    def call(x: Any, weight: Any, h0: Any, c0: Any, bias: Any, *_: Any) -> Any:
        one = torch.eye(x.shape[2], dtype=x.dtype, device=x.device)
        states = h0[None] if c0 is None else (h0[None], c0[None])
        weights = [one, weight, torch.zeros_like(bias), bias]
        y, *last = getattr(torch._VF, mode)(x, states, weights, True, 1, 0.0, False, False, False)
        return (y, *[s[0] for s in last])

    return call


def _case(
    name: str, mode: str, steps: int, batch: int, hidden: int, *, out: int = 0, lengths: bool = False, cpu: bool = False, **more: Any
) -> Case:  # fmt: skip
    rows, p = GATES[mode] * hidden, out or hidden
    shapes = (
        (steps, batch, rows), (rows, p), (batch, p), (batch, hidden) if mode == "lstm" else None, (rows,),
        (p, hidden) if out else None, Labels((batch,), steps) if lengths else None,
    )  # fmt: skip
    flops = 2 * steps * batch * p * (rows + (hidden if out else 0))
    title = f"{name}, T {steps} × B {batch} × H {hidden}"
    return Case(
        recurrent, title, shapes, {"mode": mode} | more, _theirs(mode), flops, cpu, tf32="cuda.matmul", gemm=False
    )


def cases() -> list[Case]:
    return [
        _case("LSTM, small", "lstm", 16, 4, 32, cpu=True),
        _case("LSTM", "lstm", 1024, 16, 768)._replace(headline=True),
        _case("LSTM, large batch", "lstm", 128, 256, 512),
        _case("GRU", "gru", 1024, 16, 768),
        _case("RNN", "rnn_tanh", 1024, 16, 768),
    ]


def audits() -> list[Case]:
    """Of two steps: the first and the last differ from what is between."""
    found = [
        _case("LSTM", "lstm", 2, 16, 256),
        _case("GRU of lengths", "gru", 2, 16, 256, lengths=True)._replace(needs=("x", "h0")),
        _case("projected", "lstm", 2, 16, 256, out=128)._replace(needs=("x", "projection")),
    ]
    everywhere = _case("RNN, a large batch", "rnn_tanh", 2, 64, 256)._replace(needs=("x",))
    return [everywhere, *[case._replace(archs=ONE_ARCH) for case in found]]
