"""Blur-pool: the pooling neuron type without weights, by strided slices. What a shift by one pixel does, it halves."""

import numpy as np

import gpulayers as gl

TAPS = (0.25, 0.5, 0.25)
WINDOW = [(i, j, a * b) for i, a in enumerate(TAPS) for j, b in enumerate(TAPS)]


def under(p, i, j, height, width):
    """What the windows' element (i, j) sees of the padded images."""
    return p[:, :, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]


@gl.register
class BlurPool(gl.Pooling):
    """A blur of 3 × 3, at every second pixel: (N, C, H, W) → (N, C, ⌈H/2⌉, ⌈W/2⌉) (Zhang 2019)."""

    def output_shape(self, input_shape):
        n, c, h, w = input_shape
        return n, c, (h + 1) // 2, (w + 1) // 2

    def forward(self, x):
        _, _, height, width = self.output_shape(x.shape)
        p = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        self.save(np.zeros_like(p))
        return sum(weight * under(p, i, j, height, width) for i, j, weight in WINDOW)

    def backward(self, dy):
        (zeros,) = self.saved
        dp = zeros.copy()
        for i, j, weight in WINDOW:
            under(dp, i, j, *dy.shape[2:])[...] += weight * dy
        return dp[:, :, 1:-1, 1:-1]


def model():
    """For images of 8 × 8 pixels, ten classes."""
    return gl.Sequential(
        *(gl.Conv2d(1, 16, 3, padding="same"), gl.ReLU(), BlurPool()),
        *(gl.Flatten(), gl.Linear(16 * 4 * 4, 10)),
    )


if __name__ == "__main__":
    from _train import train

    print(train(model()))
