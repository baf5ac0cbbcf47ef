"""The same model and training in torch, its layers those of gpulayers.torch."""

from __future__ import annotations

import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import random
from gpulayers.language._report import Reporter, Settings
from gpulayers.train.data import order


class Residual(nn.Sequential):
    """y = x + f(x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class PositionEmbedding(nn.Module):
    """y[n, l] = x[n, l] + weight[l]."""

    def __init__(self, positions: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(positions, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight[: x.shape[1]]


class Attention(nn.Module):
    """Causal self-attention: (N, L, width) → (N, L, width)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = gt.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(n, length, width))


def module(settings: Settings, vocabulary: int) -> nn.Sequential:
    """``gpulayers.language.gpt`` as a torch module: weights have the same names."""
    width = settings.width
    blocks = [
        part
        for _ in range(settings.layers)
        for part in (
            Residual(nn.LayerNorm(width), Attention(width, settings.heads)),
            Residual(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
        )
    ]
    embeddings = nn.Embedding(vocabulary, width), PositionEmbedding(settings.context, width)
    return nn.Sequential(*embeddings, *blocks, nn.LayerNorm(width), nn.Linear(width, vocabulary))


def train(
    model: gl.Sequential, data: tuple, held_out: tuple, checkpoint: pathlib.Path, settings: Settings,
    report: Reporter, resume: bool, progress: bool,
) -> gl.History:  # fmt: skip
    """Train a twin of ``model`` from its weights, on the rows that ``model.fit`` would take; ``model`` gets what it learned."""
    twin = module(settings, model[0].num_embeddings).to(settings.device)
    twin.load_state_dict({name: torch.tensor(a) for name, a in model.state_dict().items()})
    patched = gt.patch(twin, fuse=True)
    if progress:
        print(patched)
    state = _State(twin, settings)
    if resume:
        state.load(checkpoint)
    while state.epoch < settings.epochs:
        start = time.perf_counter()
        scores = {"loss": state.pass_over(data, progress), "val_loss": state.evaluate(held_out)}
        lr = settings.rate((state.epoch + 1) * settings.steps)
        scores |= {"lr": lr, "seconds": time.perf_counter() - start}
        state.history.add(scores)
        _hand_back(twin, model)
        report.report(state.epoch, scores, model)
        state.epoch += 1
        state.save(checkpoint)
    _hand_back(twin, model)  # of a checkpoint that was at its end, too
    return state.history


def _hand_back(twin: nn.Module, model: gl.Sequential) -> None:
    model.load_state_dict({name: t.detach() for name, t in twin.state_dict().items()})


class _State:
    """What a checkpoint keeps, and a pass over the data."""

    def __init__(self, twin: nn.Module, settings: Settings):
        self.twin, self.settings, self.history = twin, settings, gl.History()
        self.epoch, self.seed = 0, int(random.draw()[0])  # as a fit draws it
        named, muon = [*twin.named_parameters()], settings.optimizer == "muon"
        inside = [muon and p.dim() == 2 and not name.startswith(settings.others) for name, p in named]
        how: dict[str, Any] = dict(lr=settings.lr, weight_decay=settings.weight_decay)
        others, matrices = ([p for (_, p), i in zip(named, inside) if i is which] for which in (False, True))
        self.optimizers: list[Any] = [gt.optim.AdamW(others, betas=(0.9, 0.99), **how)]
        if muon:
            self.optimizers.append(gt.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **how))

    def pass_over(self, data: tuple, progress: bool) -> float:
        """The mean loss of an epoch, in nats."""
        from tqdm.auto import tqdm

        size, steps = self.settings.batch_size, self.settings.steps
        rows: Any = order(self.seed, self.epoch, len(data[0]), True, steps * size)
        total = torch.zeros((), dtype=torch.float64, device=self.settings.device)
        label = f"epoch {self.epoch + 1}/{self.settings.epochs}"
        self.twin.train()
        bar = tqdm(np.split(rows, steps), desc=label, disable=not progress, unit="batch", leave=False)
        for step, batch in enumerate(bar, self.epoch * steps):
            rate = self.settings.rate(step)
            for group in (group for each in self.optimizers for group in each.param_groups):
                group["lr"] = rate
            loss = self._loss(*self._batch(data, batch))
            self.twin.zero_grad()
            loss.backward()
            gt.optim.clip_grad_norm_(self.twin.parameters(), self.settings.clip_norm)
            for each in self.optimizers:
                each.step()
            total += loss.detach()
        return float(total) / steps

    @torch.no_grad()
    def evaluate(self, data: tuple) -> float:
        """The mean loss a token, in nats."""
        self.twin.eval()
        sums = [self._loss(x, y) * y.numel() for x, y in self._batches(data)]
        return float(sum(sums)) / data[1].size

    def _batches(self, data: tuple) -> Iterator[tuple]:
        for start in range(0, len(data[0]), self.settings.batch_size):
            yield self._batch(data, slice(start, start + self.settings.batch_size))

    def _batch(self, data: tuple, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (torch.from_numpy(a[rows].astype(np.int64)).to(self.settings.device) for a in data)
        return x, y

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        kind = self.settings.device.partition(":")[0]
        dtype = getattr(torch, self.settings.precision or "float32")
        with torch.autocast(kind, dtype, enabled=self.settings.precision is not None):
            logits = self.twin(x)
        return gt.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    def save(self, path: pathlib.Path) -> None:
        """Whole or not at all."""
        fresh = path.with_suffix(".new")
        torch.save(
            {
                "weights": self.twin.state_dict(),
                "optimizers": [each.state_dict() for each in self.optimizers],
                "history": dict(self.history),
                "epoch": self.epoch,
                "seed": self.seed,
            },
            fresh,
        )
        os.replace(fresh, path)

    def load(self, path: pathlib.Path) -> None:
        kept = torch.load(path, weights_only=True)
        self.twin.load_state_dict(kept["weights"])
        for each, state in zip(self.optimizers, kept["optimizers"], strict=True):
            each.load_state_dict(state)
        self.history = gl.History(kept["history"])
        self.epoch, self.seed = kept["epoch"], kept["seed"]
