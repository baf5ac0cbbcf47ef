"""MyLayer, a convolutional layer. After a change: gpulayers check my_layer.py:MyLayer"""

import numpy as np

import gpulayers as gl


@gl.register
class MyLayer(gl.Convolutional):
    """y = s tanh(x * W + b), with W, b and s (one for each channel) learned: (N, C, H, W) → (N, O, H, W)."""

    def __init__(self, in_channels, out_channels, kernel_size=3, padding="same"):
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)  # weight and bias
        self.scale = self.add_weight("scale", (out_channels, 1, 1), init="ones")

    def forward(self, x):
        t = np.tanh(super().forward(x))
        self.save(t)
        return self.scale * t

    def backward(self, dy):
        (t,) = self.saved
        self.scale.grad += (dy * t).sum((0, 2, 3))[:, None, None]
        return super().backward(dy * self.scale * (1 - t * t))  # dx; weight's and bias's gradients are added to
