"""Linear attention, by an op with a Triton kernel: its cost grows with the sequence, not with the sequence's square."""

from _product import linear_attention

import gpulayers as gl


@gl.register
class LinearAttention(gl.Layer):
    """y = q (kᵀ v) / T, with q, k and v linear in x: (N, T, C) → (N, T, C) (after Katharopoulos et al. 2020)."""

    def build(self, input_shape):
        size = input_shape[2]
        self.mix = [self.add_weight(name, (size, size), init="fan_in_uniform") for name in ("query", "key", "value")]

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        self.save(x)
        return self.run(linear_attention, *(x @ w.T for w in self.mix)) / x.shape[1]

    def backward(self, dy):
        (x,), dx = self.saved, 0
        for w, g in zip(self.mix, self.run_backward(dy / x.shape[1])):
            w.grad += (g.swapaxes(1, 2) @ x).sum(0)
            dx = dx + g @ w
        return dx


def model():
    """For images of 8 × 8 pixels, ten classes: a row is a place of the sequence."""
    return gl.Sequential(gl.Reshape(8, 8), gl.Residual(LinearAttention()), gl.Flatten(), gl.Linear(64, 10))


if __name__ == "__main__":
    from _train import train

    print(train(model()))
