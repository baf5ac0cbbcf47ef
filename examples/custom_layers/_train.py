"""What the layers in this folder share: training on scikit-learn's digits."""

import gpulayers as gl
from gpulayers.demo import digits


def train(model, epochs=10, progress=True):
    """Train on digits, images (N, 1, 8, 8); returns the history, with the accuracy on those held out."""
    x, y, held_x, held_y = digits()
    options = {"optimizer": gl.AdamW(3e-3), "metrics": ["accuracy"], "validation": (held_x, held_y)}
    return model.fit(x, y, epochs=epochs, **options, progress=progress)
