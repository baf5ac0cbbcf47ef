"""Whole training steps of models on the CPU: plain torch.nn beside the same model patched."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from gpulayers.bench.measuring.timing import quantiles, take_turns
from gpulayers.bench.models.gpt import GPT
from gpulayers.bench.models.kind import Kind, NextToken, images, stepping, tokens
from gpulayers.bench.models.resnet import ResNet
from tqdm.auto import tqdm

import gpulayers.torch as gt

MOST = {"float32": 1.3, "bfloat16": 1.5, "autocast": 1.5, "compiled": 1.3}
"""How many times torch's time a patched model's step may take."""
ROW_MAJOR = torch.contiguous_format
KINDS = {
    "GPT, 4 blocks of 128, 4 × 128 tokens": Kind(lambda: GPT(512, 128, 4, 4, 128), tokens(4, 128, 512), NextToken),
    "ResNet, 4 blocks of 32, 8 × 64²": Kind(
        lambda: ResNet((1, 1, 1, 1), 32, 10), images(8, 64, 10), optimizer="SGD", memory_format=ROW_MAJOR
    ),
}
"""Small enough for a CPU."""
OPTIMIZERS: dict[str, Callable[..., Any]] = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}


def prepared(kind: Kind, mode: str, patched: bool) -> Callable[[], torch.Tensor]:
    """A step of training in this mode."""
    model, batch = kind.made()
    if mode == "bfloat16":
        model, batch = model.bfloat16(), tuple(t.bfloat16() if t.is_floating_point() else t for t in batch)
    if patched:
        gt.patch(model)
    optimizer = OPTIMIZERS[kind.optimizer](model.parameters(), lr=1e-3)
    call: Callable = torch.compile(model) if mode == "compiled" else model
    cast = functools.partial(torch.autocast, "cpu", torch.bfloat16) if mode == "autocast" else contextlib.nullcontext
    return stepping(call, batch, optimizer, cast)


def against_torch(seconds: float, progress: bool = True) -> list[dict[str, Any]]:
    """ms of a step of each model in float32, bfloat16, under autocast and compiled; torch's and ours take turns, on as
    many threads as there are cores."""
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    todo = [(name, kind, mode) for name, kind in KINDS.items() for mode in MOST]
    for name, kind, mode in tqdm(todo, disable=not progress, unit="step", desc="training steps"):
        steps = {who: prepared(kind, mode, patched=who == "gpulayers") for who in ("gpulayers", "torch")}
        for step in steps.values():
            step()  # plans, and what compiles
        turns = {who: lambda s=step: [_timed(s)] for who, step in steps.items()}  # type: ignore[misc]
        found = {who: quantiles(samples) for who, samples in take_turns(turns, 9, seconds).items()}
        mine, theirs = found["gpulayers"]["p20"], found["torch"]["p20"]
        row = {"model": name, "mode": mode, "ms": mine * 1e3, "torch_ms": theirs * 1e3, "ratio": mine / theirs}
        rows.append(row | {"most": MOST[mode]})
    return rows


def _timed(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin
