"""TensorFlow.js' own example of a custom layer, with a backward: it keeps what a rectifier throws away."""

import numpy as np

import gpulayers as gl


@gl.register
class Antirectifier(gl.Layer):
    """The positive and the negative part of x, centred and of length 1, side by side: (…, C) → (…, 2C)."""

    def output_shape(self, input_shape):
        return (*input_shape[:-1], 2 * input_shape[-1])

    def forward(self, x):
        centred = x - x.mean(-1, keepdims=True)
        length = np.sqrt((centred * centred).sum(-1, keepdims=True) + 1e-6)
        u = centred / length
        self.save(u, length)
        return np.concatenate([np.maximum(u, 0), np.maximum(-u, 0)], axis=-1)

    def backward(self, dy):
        u, length = self.saved
        size = u.shape[-1]
        du = dy[..., :size] * (u > 0) - dy[..., size:] * (u < 0)
        d_centred = (du - u * (du * u).sum(-1, keepdims=True)) / length
        return d_centred - d_centred.mean(-1, keepdims=True)


def model():
    """For images of 8 × 8 pixels, ten classes."""
    return gl.Sequential(gl.Flatten(), gl.Linear(64, 32), Antirectifier(), gl.Linear(64, 10))


if __name__ == "__main__":
    from _train import train

    print(train(model()))
