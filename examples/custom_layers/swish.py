"""Swish with a learned slope: a layer that computes each number by itself, with a weight of its own."""

import numpy as np

import gpulayers as gl


@gl.register
class Swish(gl.Layer):
    """y = x σ(βx), β learned; any shape (Ramachandran et al. 2017)."""

    def build(self, input_shape):
        self.beta = self.add_weight("beta", (), init="ones")

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        s = 1 / (1 + np.exp(-self.beta * x))
        self.save(x, s)
        return x * s

    def backward(self, dy):
        x, s = self.saved
        slope = x * s * (1 - s)
        self.beta.grad += (dy * x * slope).sum()
        return dy * (s + self.beta * slope)


def model():
    """For images of 8 × 8 pixels, ten classes."""
    return gl.Sequential(gl.Flatten(), gl.Linear(64, 64), Swish(), gl.Linear(64, 10))


if __name__ == "__main__":
    from _train import train

    print(train(model()))
