"""Squeeze and excitation: each channel of an image, weighed by what all channels say."""

import numpy as np

import gpulayers as gl


@gl.register
class SqueezeExcitation(gl.Layer):
    """y = x σ(W₂ relu(W₁ mean(x))): (N, C, H, W) → (N, C, H, W) (Hu et al. 2018)."""

    neuron_type = "convolutional"

    def __init__(self, reduction=4):
        self.reduction = reduction

    def build(self, input_shape):
        channels = input_shape[1]
        hidden = max(1, channels // self.reduction)
        self.squeeze = self.add_weight("squeeze", (hidden, channels), init="kaiming_uniform")
        self.excite = self.add_weight("excite", (channels, hidden), init="kaiming_uniform")

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        mean = x.mean((2, 3))
        h = np.maximum(mean @ self.squeeze.T, 0)
        gate = 1 / (1 + np.exp(-(h @ self.excite.T)))
        self.save(x, mean, h, gate)
        return x * gate[:, :, None, None]

    def backward(self, dy):
        x, mean, h, gate = self.saved
        dz = (dy * x).sum((2, 3)) * gate * (1 - gate)
        self.excite.grad += dz.T @ h
        dh = (dz @ self.excite) * (h > 0)
        self.squeeze.grad += dh.T @ mean
        dmean = (dh @ self.squeeze) / (x.shape[2] * x.shape[3])
        return dy * gate[:, :, None, None] + dmean[:, :, None, None]


def model():
    """For images of 8 × 8 pixels, ten classes."""
    return gl.Sequential(
        *(gl.Conv2d(1, 16, 3, padding="same"), gl.ReLU(), SqueezeExcitation()),
        *(gl.MaxPool2d(2), gl.Flatten(), gl.Linear(16 * 4 * 4, 10)),
    )


if __name__ == "__main__":
    from _train import train

    print(train(model()))
