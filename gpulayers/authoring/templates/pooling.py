"""MyLayer, a pooling layer. After a change: gpulayers check my_layer.py:MyLayer"""

import gpulayers as gl
from gpulayers.ops.pooling import avg_pool, max_pool


@gl.register
class MyLayer(gl.Pooling):
    """y = mean + a (max − mean) under each window, a learned for each channel: (N, C, H, W) → (N, C, OH, OW)."""

    op = max_pool  # whose rule gives the output's shape

    def __init__(self, kernel_size=2):
        self.kernel_size = kernel_size

    def options(self):
        return {"kernel_size": self.kernel_size}

    def build(self, input_shape):
        self.mix = self.add_weight("mix", (input_shape[1], 1, 1), init=0.5)

    def forward(self, x):
        mean = self.run(avg_pool, x, **self.options())
        above = self.run(max_pool, x, **self.options()) - mean
        self.save(above)
        return mean + self.mix * above

    def backward(self, dy):
        (above,) = self.saved
        self.mix.grad += (dy * above).sum((0, 2, 3))[:, None, None]
        dx = self.run_backward(self.mix * dy)  # of the maximum: backwards come in reverse order
        return dx + self.run_backward((1 - self.mix) * dy)
