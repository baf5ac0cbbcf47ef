"""Whole training steps of GPT-2 124M and ResNet-50 on a GPU, in bfloat16 autocast: plain, patched, fused, each compiled too.

``python -m gpulayers.bench.measuring.training OUT SECONDS`` writes OUT/steps.json after each row. What fails is a row that
says why; what does not fit the time is left out.
"""

from __future__ import annotations

import functools
import gc
import itertools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpulayers.bench.measuring.models import GPT, Kind, ResNet, stepping
from gpulayers.bench.measuring.records import machine, write_json

import gpulayers.torch as gt

WARM, TIMED = 5, 10
"""Steps."""
WAYS = ("torch", "patched", "fused", "torch, compiled", "fused, compiled", "patched, compiled")
"""The most telling first: compiling takes a minute."""


def _gpt2() -> GPT:
    return GPT(50257, 768, 12, 12, 1024, 0.0)


def _resnet50() -> ResNet:
    return ResNet((3, 4, 6, 3), 64, 1000).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _images() -> tuple[torch.Tensor, ...]:
    x = torch.randn(128, 3, 224, 224).to(memory_format=torch.channels_last)
    return x, torch.randint(1000, (128,))


LARGE = {
    "GPT-2 124M, 16 × 1,024 tokens": Kind(_gpt2, lambda: (torch.randint(50257, (16, 1024)),), "AdamW"),
    "ResNet-50, 128 × 224²": Kind(_resnet50, _images, "SGD"),
}


def prepared(kind: Kind, way: str, device: str) -> Callable[[], torch.Tensor]:
    """A step of training in one of the WAYS; gives the loss. Each way starts from the same weights and takes one batch."""
    torch.manual_seed(0)
    model, batch = kind.make().to(device), tuple([t.to(device) for t in kind.batch()])
    plain = way.startswith("torch")
    if not plain:
        gt.patch(model, fuse=way.startswith("fused"))
    home: Any = torch.optim if plain else gt.optim
    options = {"fused": True} if plain and device == "cuda" else {}
    optimizer = getattr(home, kind.optimizer)(model.parameters(), lr=1e-3, **options)
    call: Callable = torch.compile(model) if way.endswith("compiled") else model
    return stepping(call, batch, optimizer, functools.partial(torch.autocast, device, torch.bfloat16))


def measured(step: Callable[[], torch.Tensor], device: str) -> dict[str, Any]:
    """ms a step, ms until the host has given a step to the GPU, the peak of memory, and the losses of the first steps."""
    on_gpu = device == "cuda"
    wait: Callable[[], Any] = torch.cuda.synchronize if on_gpu else lambda: None
    losses = [float(step()) for _ in range(WARM)]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    host = []
    for _ in range(TIMED):  # from an idle GPU on, so that the host does not wait for it
        wait()
        begin = time.perf_counter()
        step()
        host.append(time.perf_counter() - begin)
    wait()
    begin = time.perf_counter()
    for _ in range(TIMED):
        step()
    wait()
    ms = (time.perf_counter() - begin) / TIMED * 1e3
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
    return {"ms": ms, "host_ms": min(host) * 1e3, "peak_GiB": peak, "losses": losses}


def rows(kinds: dict[str, Kind], device: str, until: float) -> Iterator[dict[str, Any]]:
    for way, (name, kind) in itertools.product(WAYS, kinds.items()):
        if time.monotonic() > until:
            return
        gc.collect()
        torch.compiler.reset()
        row: dict[str, Any] = {"model": name, "way": way}
        try:
            row |= measured(prepared(kind, way, device), device)
        except Exception as error:  # the others are worth their time
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        yield row


def main(out: pathlib.Path, seconds: float, kinds: dict[str, Kind], device: str = "cuda") -> int:
    """1 where a way failed."""
    found: list[dict[str, Any]] = []
    for row in rows(kinds, device, time.monotonic() + seconds):
        found.append(row)
        write_json(out / "steps.json", {"machine": machine(), "rows": found})
        told = row.get("error") or f"{row['ms']:.1f} ms, host {row['host_ms']:.1f} ms, loss {row['losses'][-1]:.4f}"
        print(f"{row['model']}: {row['way']}: {told}", flush=True)
    return int(any("error" in row for row in found))


if __name__ == "__main__":
    raise SystemExit(main(pathlib.Path(sys.argv[1]), float(sys.argv[2]), LARGE))
