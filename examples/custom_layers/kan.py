"""A Kolmogorov-Arnold layer: in place of a number, each connection has a curve of its own, a sum of bumps."""

import numpy as np

import gpulayers as gl


@gl.register
class KAN(gl.Layer):
    """yⱼ = Σᵢ fⱼᵢ(xᵢ), f a sum of Gaussians on a grid: (N, in_features) → (N, out_features) (Liu 2024, Li 2024)."""

    neuron_type = "fully connected"

    def __init__(self, in_features, out_features, bumps=6, reach=1.5):
        self.in_features, self.out_features, self.bumps = in_features, out_features, bumps
        self.sharpness = (bumps - 1) / (2 * reach)  # one over the distance of two bumps
        points = lambda shape, random: np.linspace(-reach, reach, bumps)  # noqa: E731
        self.grid = self.add_weight("grid", (bumps,), init=points, trainable=False)
        self.weight = self.add_weight("weight", (out_features, in_features * bumps), init="fan_in_uniform")

    def output_shape(self, input_shape):
        return (input_shape[0], self.out_features)

    def forward(self, x):
        t = (x[:, :, None] - self.grid) * self.sharpness
        bump = np.exp(-t * t)
        self.save(t, bump)
        return bump.reshape(len(x), self.in_features * self.bumps) @ self.weight.T

    def backward(self, dy):
        t, bump = self.saved
        self.weight.grad += dy.T @ bump.reshape(len(dy), self.in_features * self.bumps)
        dbump = (dy @ self.weight).reshape(t.shape)
        return -2 * self.sharpness * (dbump * bump * t).sum(-1)


def model():
    """For images of 8 × 8 pixels, ten classes."""
    return gl.Sequential(gl.Flatten(), KAN(64, 16), KAN(16, 10))


if __name__ == "__main__":
    from _train import train

    print(train(model()))
