"""A layer of your own with a learned weight: checked, trained, saved, loaded."""

import tempfile

import numpy as np

import gpulayers as gl
from gpulayers.testing import check_layer


@gl.register
class Swish(gl.Layer):
    """y = x σ(βx), β learned."""

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


if __name__ == "__main__":
    print("passed:", ", ".join(check_layer(Swish(), (None, 5))))
    gl.random.seed(0)
    x = np.random.default_rng(0).standard_normal((512, 2)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    model = gl.Sequential(gl.Linear(2, 32), Swish(), gl.Linear(32, 2))
    history = model.fit(x, y, epochs=40, optimizer=gl.AdamW(1e-2), metrics=["accuracy"], progress=False)
    print(f"accuracy {history['accuracy'][-1]:.3f}, beta {float(model[1].beta.data):.3f}")
    with tempfile.TemporaryDirectory() as folder:
        gl.save(model, f"{folder}/model")
        assert np.array_equal(gl.load(f"{folder}/model").predict(x), model.predict(x))
    assert history["accuracy"][-1] > 0.95
