"""Draws the gallery's pictures into docs/images: ``python docs/plots.py [layer …]``. Each layer learns scikit-learn's digits."""

import importlib
import pathlib
import sys

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import gpulayers as gl
from gpulayers.demo import digits

DOCS = pathlib.Path(__file__).resolve().parent
matplotlib.rcParams.update(
    {"svg.hashsalt": "gpulayers", "svg.fonttype": "none", "font.size": 8, "axes.grid": True, "grid.alpha": 0.3}
)


def reached(model, name, x):
    """(the first layer called ``name``, what comes to it)."""
    with gl.no_grad():
        for layer in model:
            for inner in layer.layers():
                if type(inner).__name__ == name:
                    return inner, x
            x = layer(x)
    raise LookupError(name)


def image(axes, values, title):
    axes.imshow(values, cmap="gray")
    axes.set(title=title, xticks=[], yticks=[])
    axes.grid(False)


def swish(axes, model, x):
    layer, t = reached(model, "Swish", x)[0], np.linspace(-6, 6, 200)
    for label, beta in (("β at first", 1.0), ("β learned", float(layer.beta.data))):
        axes.plot(t, t / (1 + np.exp(-beta * t)), label=f"{label}, {beta:.2f}")
    axes.set(title="x σ(βx)", xlabel="x")
    axes.legend()


def symlog(axes, model, x):
    t = np.linspace(-100, 100, 400)
    axes.plot(t, np.sign(t) * np.log1p(np.abs(t)))
    axes.set(title="sign(x) log(1 + |x|)", xlabel="x")


def antirectifier(axes, model, x):
    layer, h = reached(model, "Antirectifier", x[:1])
    with gl.no_grad():
        y = layer(h)[0]
    half = len(y) // 2
    axes.bar(range(half), y[:half], label="first half")
    axes.bar(range(half), -y[half:], label="second half, turned down")
    axes.set(title="what becomes of one digit's 32 features")
    axes.legend()


def maxout(axes, model, x):
    layer, h = reached(model, "Maxout", x)
    t = np.linspace(-1, 1, 200, dtype="f")[:, None]
    with gl.no_grad():
        y = layer(h[:1] + t * (h[1:2] - h[:1]) * 3)
    axes.plot(t, y[:, :5])
    axes.set(title="five outputs on a line through two digits", xlabel="place on the line")


def kan(axes, model, x):
    layer, t = reached(model, "KAN", x)[0], np.linspace(0, 1, 100)
    bump = np.exp(-(((t[:, None] - layer.grid.data) * layer.sharpness) ** 2))
    weight = layer.weight.data.reshape(layer.out_features, layer.in_features, layer.bumps)
    most = np.argsort(-np.abs(weight).sum(-1), axis=None)[:6]
    for j, i in zip(*np.unravel_index(most, weight.shape[:2])):
        axes.plot(t, bump @ weight[j, i], label=f"pixel {i} to {j}")
    axes.set(title="the curves of six connections", xlabel="pixel")
    axes.legend()


def blur_pool(axes, model, x):
    layer, _ = reached(model, "BlurPool", x)
    shifted = np.roll(x[:1], 1, axis=3)
    with gl.no_grad():
        blurred = [np.kron(layer(each)[0, 0], np.ones((2, 2))) for each in (x[:1], shifted)]
    rows = [np.hstack([each, blur]) for each, blur in zip((x[0, 0], shifted[0, 0]), blurred)]
    image(axes, np.vstack(rows), "a digit and what is left of it; moved by a pixel below")


def dynamic_filter(axes, model, x):
    layer, h = reached(model, "DynamicFilter", x[:10])
    f = np.matmul(h.mean((2, 3)), layer.weight.data) + layer.bias.data  # (9, N, C)
    tiles = np.pad(f.reshape(3, 3, *f.shape[1:]), ((0, 1), (0, 1), (0, 0), (0, 0)), constant_values=f.max())
    image(
        axes,
        np.vstack([np.hstack([tiles[:, :, n, c] for n in range(10)]) for c in range(5)]),
        "5 filters, for 10 digits",
    )


def squeeze_excitation(axes, model, x):
    y = digits()[1][: len(x)]
    layer, h = reached(model, "SqueezeExcitation", x)
    hidden = np.maximum(h.mean((2, 3)) @ layer.squeeze.data.T, 0)
    gate = 1 / (1 + np.exp(-hidden @ layer.excite.data.T))
    rows = np.stack([gate[y == digit].mean(0) for digit in range(10)])
    image(axes, rows - rows.mean(0), "gates beside their mean: a row a digit, a column a channel")


def linear_attention(axes, model, x):
    layer, h = reached(model, "LinearAttention", x[:1])
    query, key, _ = (h[0] @ w.data.T for w in layer.mix)
    image(axes, query @ key.T, "q kᵀ: what the rows of a digit ask of one another")


PANELS = {f.__name__: f for f in (
    antirectifier, blur_pool, dynamic_filter, kan, linear_attention, maxout, squeeze_excitation, swish, symlog,
)}  # fmt: skip


def draw(name, folder, epochs=10):
    """Train the layer's model, and draw how it learned and what the layer does."""
    gl.random.seed(0)
    model = importlib.import_module(name).model()
    history = importlib.import_module("_train").train(model, epochs, progress=False)
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    steps = range(1, epochs + 1)
    left.plot(steps, history["accuracy"], label="training")
    left.plot(steps, history["val_accuracy"], label="held out")
    left.set(title=f"accuracy on digits: {history['val_accuracy'][-1]:.1%}", xlabel="epoch", ylim=(0, 1))
    left.legend()
    PANELS[name](right, model, digits()[0][:256])
    figure.savefig(pathlib.Path(folder) / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    sys.path.insert(0, str(DOCS.parent / "examples/custom_layers"))
    for name in sys.argv[1:] or PANELS:
        draw(name, DOCS / "images")
