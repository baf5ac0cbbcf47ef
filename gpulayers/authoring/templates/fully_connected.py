"""MyLayer, a fully connected layer. After a change: gpulayers check my_layer.py:MyLayer"""

import numpy as np

import gpulayers as gl


@gl.register
class MyLayer(gl.FullyConnected):
    """y = s tanh(x Wᵀ + b), with W, b and s learned: (…, in_features) → (…, out_features)."""

    def build(self, input_shape):
        super().build(input_shape)  # weight (out_features, in_features) and bias (out_features,)
        self.scale = self.add_weight("scale", (self.out_features,), init="ones")

    def forward(self, x):
        t = np.tanh(super().forward(x))
        self.save(t)
        return self.scale * t

    def backward(self, dy):
        (t,) = self.saved
        self.scale.grad += (dy * t).reshape(-1, self.out_features).sum(0)
        return super().backward(dy * self.scale * (1 - t * t))  # dx; weight's and bias's gradients are added to
