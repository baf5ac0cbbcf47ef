"""The main job: a convolutional network with a layer of our own, trained on real handwritten digits."""

from __future__ import annotations

import gzip
import math
import pathlib
import struct
import time
import zlib
from typing import Any

import numpy as np

import gpulayers as gl

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""(x, y) to train on, (x, y) held out; x float32 (N, 1, height, width) in [0, 1], y int64 (N,)."""


@gl.register(name="demo.Swish")
class Swish(gl.Layer):
    """x σ(βx), β learned for each channel (Ramachandran et al. 2017); x (N, C, H, W)."""

    def build(self, input_shape: tuple) -> None:
        self.beta = self.add_weight("beta", (input_shape[1], 1, 1), init="ones")

    def output_shape(self, input_shape: tuple) -> tuple:
        return input_shape

    def forward(self, x: Any) -> Any:
        s = 1 / (1 + np.exp(-self.beta * x))
        self.save(x, s)
        return x * s

    def backward(self, dy: Any) -> Any:
        x, s = self.saved
        slope = x * s * (1 - s)
        self.beta.grad += (dy * x * slope).sum((0, 2, 3))[:, None, None]
        return dy * (s + self.beta * slope)


def digits() -> Split:
    """scikit-learn's 1,797 digits of 8 × 8 pixels; every fifth is held out. Raises RuntimeError without scikit-learn."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise RuntimeError("the digits come with scikit-learn: pip install 'gpulayers[demo]'") from None
    data = load_digits()
    x = (data.images[:, None] / 16).astype(np.float32)
    y = data.target.astype(np.int64)
    held_out = np.arange(len(x)) % 5 == 4
    return x[~held_out], y[~held_out], x[held_out], y[held_out]


MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def mnist(folder: str) -> Split:
    """The 70,000 digits of 28 × 28 pixels from the four IDX files (as they are, or .gz) in ``folder``."""
    train_x, train_y, test_x, test_y = (_read_idx(pathlib.Path(folder), name) for name in MNIST_FILES)
    for x, y in ((train_x, train_y), (test_x, test_y)):
        if x.ndim != 3 or y.ndim != 1 or len(x) != len(y):
            raise ValueError(f"{folder}: the rule is images (N, h, w) and labels (N,); got {x.shape} and {y.shape}")
        if not len(x) or x.shape[1:] != (train_x.shape[2],) * 2 or x.shape[2] < 4 or y.max() > 9:
            came = f"{x.shape} and labels up to {max(y, default=0)}"
            raise ValueError(f"{folder}: the rule is square images of one size ≥ 4, N ≥ 1, and labels ≤ 9; got {came}")
    images = [(x[:, None] / 255).astype(np.float32) for x in (train_x, test_x)]
    return images[0], train_y.astype(np.int64), images[1], test_y.astype(np.int64)


def _read_idx(folder: pathlib.Path, name: str) -> np.ndarray:
    """An array of bytes in the IDX format: two zeros, a type (8: unsigned bytes), the rank, the sizes, the data."""
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder / name}[.gz]: not there; MNIST is the four files {', '.join(MNIST_FILES)}")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, rank = struct.unpack(">HBB", data[:4])
        sizes = struct.unpack(f">{rank}I", data[4 : 4 + 4 * rank])
    except (EOFError, zlib.error, struct.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: no IDX file, or cut off ({error})") from error
    if zeros or kind != 8 or len(data) != 4 + 4 * rank + math.prod(sizes):
        raise ValueError(f"{path}: no IDX file of bytes, or cut off")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(sizes)


def network(size: int) -> gl.Sequential:
    """For images of ``size`` × ``size`` pixels, ten classes."""
    return gl.Sequential(
        gl.Conv2d(1, 32, 3, padding="same", bias=False),
        gl.BatchNorm2d(32),
        Swish(),
        gl.Residual(gl.Conv2d(32, 32, 3, padding="same", bias=False), gl.BatchNorm2d(32), Swish()),
        gl.MaxPool2d(2),
        gl.Conv2d(32, 64, 3, padding="same", bias=False),
        gl.BatchNorm2d(64),
        Swish(),
        gl.MaxPool2d(2),
        gl.Flatten(),
        gl.Dropout(0.3),
        gl.Linear(64 * (size // 4) ** 2, 10),
    )


def train(
    data: Split,
    out: str,
    *,
    epochs: int = 15,
    batch_size: int = 64,
    device: str = "cpu",
    precision: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """Train, plot, save, load again, compare; everything is written below the folder ``out``.

    Returns {"accuracy", "seconds", "same_bits", "model", "plot", "history"}.
    """
    x, y, held_x, held_y = data
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"train: the rule is epochs ≥ 1 and batch size ≥ 1; got {epochs} and {batch_size}")
    folder = pathlib.Path(out)
    folder.mkdir(parents=True, exist_ok=True)  # what cannot be written fails before training
    gl.random.seed(seed)
    model = network(x.shape[-1]).to(device)
    model.ensure_built((None, *x.shape[1:]))
    if progress:
        print(model.summary((None, *x.shape[1:])))
    steps = epochs * -(-len(x) // batch_size)
    optimizer = gl.AdamW(lr=lambda step: 3e-3 * 0.5 * (1 + np.cos(np.pi * min(step / steps, 1))), weight_decay=1e-2)
    start = time.perf_counter()
    history = model.fit(
        x,
        y,
        epochs=epochs,
        batch_size=batch_size,
        optimizer=optimizer,
        metrics=["accuracy"],
        validation=(held_x, held_y),
        precision=precision,
        progress=progress,
    )
    seconds = time.perf_counter() - start
    gl.save(model, folder / "model")
    history.save(folder / "history.json")
    plot = history.plot_if_possible(folder / "learning_curve.png")
    before = model.predict(held_x, batch_size=256)
    after = gl.load(folder / "model").to(device).predict(held_x, batch_size=256)
    return {
        "accuracy": float((before.argmax(1) == held_y).mean()),
        "seconds": seconds,
        "same_bits": bool(np.array_equal(before, after)),
        "model": str(folder / "model"),
        "plot": plot,
        "history": history,
    }
