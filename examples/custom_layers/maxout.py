"""Maxout: the fully connected neuron type brings the product and its weights; the layer writes what differs."""

import gpulayers as gl


@gl.register
class Maxout(gl.FullyConnected):
    """The largest of a few linear functions: (N, in_features) → (N, out_features) (Goodfellow et al. 2013)."""

    def __init__(self, in_features, out_features, pieces=2):
        self.units, self.pieces = out_features, pieces
        super().__init__(in_features, out_features * pieces)

    def output_shape(self, input_shape):
        return (input_shape[0], self.units)

    def forward(self, x):
        z = super().forward(x).reshape(len(x), self.units, self.pieces)
        y = z.max(axis=2)
        self.save(z == y[:, :, None])
        return y

    def backward(self, dy):
        (won,) = self.saved
        dz = won * dy[:, :, None]
        return super().backward(dz.reshape(len(dy), self.units * self.pieces))


def model():
    """For images of 8 × 8 pixels, ten classes."""
    return gl.Sequential(gl.Flatten(), Maxout(64, 32, pieces=3), gl.Linear(32, 10))


if __name__ == "__main__":
    from _train import train

    print(train(model()))
