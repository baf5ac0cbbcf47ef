"""Random models of the library's own layers, each of which can follow the one before."""

from __future__ import annotations

import numpy as np

import gpulayers as gl

PLAIN = [
    gl.ReLU, gl.Sigmoid, gl.Tanh, gl.SiLU, gl.GELU, gl.Mish, gl.Softplus, gl.Softsign, gl.SELU, gl.ELU, gl.CELU, gl.LeakyReLU,
    gl.ReLU6, gl.Hardswish, gl.Hardsigmoid, gl.Hardtanh, gl.Hardshrink, gl.Softshrink, gl.LogSigmoid, gl.Tanhshrink,
    gl.PReLU, gl.Softmax, gl.LogSoftmax, gl.Softmin,
]  # fmt: skip
FUSED = [None, "relu", "gelu", "silu", "tanh", "hardswish", "elu"]


class Stack:
    """Draws layers for ``shape``, batch left out, and keeps up with what they make of it."""

    def __init__(self, seed: int):
        self.random = np.random.default_rng(seed)
        self.shape: tuple[int, ...] = tuple(self.ints(*sizes) for sizes in ((1, 4), (4, 7), (4, 7)))
        if self.random.random() < 0.3:
            self.shape = (self.ints(2, 9),)

    def ints(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high))

    def any(self, *choices):
        return choices[self.ints(0, len(choices))]

    def model(self, length: int) -> tuple[gl.Sequential, tuple]:
        first = self.shape
        return gl.Sequential(*(self.next() for _ in range(length))), first

    def next(self) -> gl.Layer:
        layer = self.image() if len(self.shape) == 3 else self.vector()
        self.shape = tuple(layer.output_shape((None, *self.shape))[1:])
        return layer

    def image(self) -> gl.Layer:
        c, h, w = self.shape
        out, k = self.ints(1, 5), self.ints(1, min(4, h + 1, w + 1))
        small = min(h, w) < 4
        choices = [
            lambda: gl.Conv2d(c, out, k, self.ints(1, 3), self.any(0, k // 2), bias=self.any(True, False)),
            lambda: gl.Conv2d(c, out, k, padding="same", padding_mode=self.any("zeros", "replicate")),
            lambda: gl.Conv2d(c, 2 * c, 3, self.ints(1, 3), 1, groups=c),
            lambda: gl.BatchNorm2d(c),
            lambda: self.plain(),
            lambda: self.any(gl.PReLU(c), gl.Softmax2d(), gl.LayerNorm((c, h, w)), gl.RMSNorm(w), gl.Linear(w, 3)),
            lambda: gl.Residual(gl.Conv2d(c, c, 3, padding=1), self.plain()),
            lambda: gl.Parallel(gl.Conv2d(c, out, 1), self.plain(), gl.MaxPool2d(3, 1, 1)),
            lambda: self.any(gl.ZeroPad2d((1, 0, 2, 1)), gl.CircularPad2d(1), gl.ConstantPad2d(1, 0.5)),
        ]
        pools = [
            lambda: gl.MaxPool2d(2, ceil_mode=self.any(True, False)),
            lambda: gl.MaxPool2d(3, self.ints(1, 3), self.any(0, 1)),
            lambda: gl.AvgPool2d(3, self.ints(1, 3), self.any(0, 1), count_include_pad=self.any(True, False)),
            lambda: gl.AdaptiveAvgPool2d((self.ints(1, min(h, 3) + 1), self.ints(1, min(w, 3) + 1))),
        ]
        flat = [lambda: gl.Flatten(), lambda: gl.GlobalAvgPool2d(), lambda: gl.Reshape(h * w, c)]
        return self.any(*(flat[:1] if small else choices + pools + flat))()

    def vector(self) -> gl.Layer:
        n = self.shape[-1]
        return self.any(
            lambda: gl.Linear(n, self.ints(1, 7), self.any(True, False), activation=self.any(*FUSED)),
            lambda: self.plain(),
            lambda: self.any(gl.LayerNorm(n), gl.RMSNorm(n), gl.BatchNorm1d(self.shape[0])),
            lambda: gl.GLU() if n % 2 == 0 else gl.Linear(n, 2 * n),
            lambda: gl.Residual(gl.Linear(n, n), self.plain(), shortcut=self.any(None, gl.Linear(n, n))),
            lambda: gl.Parallel(gl.Linear(n, n), self.plain(), merge=self.any("sum", "concat")),
            lambda: gl.Flatten(),
        )()

    def plain(self) -> gl.Layer:
        return self.any(*PLAIN)()
