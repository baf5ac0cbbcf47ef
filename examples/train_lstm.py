"""A small LSTM learns to write as Python's help does, once in layers of arrays and once through torch: the same losses.

Run it: ``python examples/train_lstm.py --steps 2000 --width 256 --layers 2 --device cuda``. It prints each road's loss as
it trains, what lies between the two at the end, and a text that the LSTM continues byte by byte.
"""

import argparse
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers.language import NextTokenLoss, read


def batches(text: np.ndarray, args: SimpleNamespace) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens, the one after each), (batch, length) both, as many times as there are steps."""
    random = np.random.default_rng(0)
    for _ in range(args.steps):
        starts = random.integers(0, len(text) - args.length, args.batch)
        rows = text[starts[:, None] + np.arange(args.length + 1)].astype(np.int64)
        yield rows[:, :-1], rows[:, 1:]


def natively(model: gl.Layer, text: np.ndarray, args: SimpleNamespace) -> list[float]:
    """The loss of each step."""
    loss, optimizer, losses = NextTokenLoss(), gl.AdamW(lr=args.rate, weight_decay=0.0), []
    for x, y in batches(text, args):
        value = loss(model(x), y)
        losses.append(float(value))
        for weight in model.weights:
            weight.zero_grad()
        model.backward(loss.backward())
        optimizer.step(model.named_weights())
    return losses


class Module(nn.Module):
    """The same for torch, with its own classes."""

    def __init__(self, args: SimpleNamespace):
        super().__init__()
        self.embedding = nn.Embedding(256, args.width)
        self.lstm = nn.LSTM(args.width, args.width, args.layers, batch_first=True)
        self.head = nn.Linear(args.width, 256)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(self.embedding(x))[0])


def through_torch(module: nn.Module, text: np.ndarray, args: SimpleNamespace) -> list[float]:
    optimizer, losses = torch.optim.AdamW(module.parameters(), args.rate, weight_decay=0.0), []
    for x, y in batches(text, args):
        logits = module(torch.from_numpy(x).to(args.device))
        loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).to(args.device).flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@torch.no_grad()
def continued(module: Module, beginning: str, count: int) -> str:
    """The state goes from byte to byte; nothing is read twice."""
    tokens, state = list(beginning.encode()), None
    given = torch.tensor([tokens], device=module.head.weight.device)
    for _ in range(count):
        y, state = module.lstm(module.embedding(given), state)
        given = module.head(y[:, -1:]).argmax(-1)
        tokens.append(int(given))
    return bytes(tokens).decode(errors="replace")


def arguments() -> SimpleNamespace:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"steps": 20, "width": 32, "layers": 2, "length": 24, "batch": 8}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--device", default="cpu")
    return SimpleNamespace(**vars(parser.parse_args()))


def main() -> None:
    args, text = arguments(), read().train
    layers = gl.Embedding(256, args.width), gl.LSTM(args.width, args.width, args.layers), gl.Linear(args.width, 256)
    model, module = gl.Sequential(*layers), Module(args)
    names = ("embedding", "lstm", "head")
    state = {
        f"{names[int(n.split('.')[0])]}.{n.split('.', 1)[1]}": torch.tensor(a) for n, a in model.state_dict().items()
    }
    module.load_state_dict(state)
    print(gt.patch(module))
    model.to(args.device)
    ours, theirs = natively(model, text, args), through_torch(module.to(args.device), text, args)
    for step in sorted({0, len(ours) // 2, len(ours) - 1}):
        print(f"step {step}: {ours[step]:.5f} natively, {theirs[step]:.5f} through torch")
    apart = max(abs(a - b) for a, b in zip(ours, theirs))
    print(f"at most {apart:.2g} apart")
    assert apart < 1e-3 or args.steps > 20, "two roads, one result"  # rounding grows from step to step
    assert ours[-1] < ours[0]
    print(continued(module, "The ", 40))


if __name__ == "__main__":
    main()
