"""A dynamic filter: a convolution whose 3 × 3 windows each image makes for itself."""

import numpy as np

import gpulayers as gl

PLACES = [(i, j) for i in range(3) for j in range(3)]


def shifted(x):
    """The nine neighbours of every pixel, zeros outside."""
    height, width = x.shape[2:]
    p = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return [p[:, :, i : i + height, j : j + width] for i, j in PLACES]


@gl.register
class DynamicFilter(gl.Layer):
    """y = x * f, f = W mean(x) + b for each image and channel: (N, C, H, W) → (N, C, H, W) (after Jia et al. 2016)."""

    neuron_type = "convolutional"

    def build(self, input_shape):
        channels = input_shape[1]
        self.weight = self.add_weight("weight", (9, channels, channels), init="kaiming_uniform")
        self.bias = self.add_weight("bias", (9, 1, 1), init=lambda shape, random: np.eye(9)[4].reshape(shape))

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        mean = x.mean((2, 3))
        f = np.matmul(mean, self.weight) + self.bias  # (9, N, C)
        self.save(x, mean, f)
        return sum(f[k, :, :, None, None] * s for k, s in enumerate(shifted(x)))

    def backward(self, dy):
        x, mean, f = self.saved
        df = np.stack([(dy * s).sum((2, 3)) for s in shifted(x)])
        self.bias.grad += df.sum((1, 2))[:, None, None]
        self.weight.grad += np.matmul(mean.T, df)
        dmean = np.matmul(df, self.weight.swapaxes(1, 2)).sum(0) / (x.shape[2] * x.shape[3])
        dx = sum(f[8 - k, :, :, None, None] * s for k, s in enumerate(shifted(dy)))
        return dx + dmean[:, :, None, None]


def model():
    """For images of 8 × 8 pixels, ten classes."""
    return gl.Sequential(
        *(gl.Conv2d(1, 12, 3, padding="same"), gl.ReLU(), DynamicFilter()),
        *(gl.MaxPool2d(2), gl.Flatten(), gl.Linear(12 * 4 * 4, 10)),
    )


if __name__ == "__main__":
    from _train import train

    print(train(model()))
