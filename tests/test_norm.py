import numpy as np
import pytest

from gpulayers.ops.norm import batch_norm, layer_norm, rms_norm
from gpulayers.testing.check_op import check_op

torch = pytest.importorskip("torch")


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape) * 2 + 1


def running(channels: int) -> tuple[np.ndarray, np.ndarray]:
    return draw(channels, seed=3), np.abs(draw(channels, seed=4)) + 0.5


def last(x: np.ndarray) -> np.ndarray:
    """x in channels-last memory."""
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)


# --- the definitions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x, tail", [((3, 5), 1), ((2, 3, 4), 2), ((4,), 1), ((0, 3), 1), ((3, 0), 1), ((1, 1), 1)])
def test_rows_by_definition(x, tail):
    shape = x[-tail:]
    weights = draw(*shape, seed=1), draw(*shape, seed=2)
    check_op(layer_norm, draw(*x), *weights, normalized_shape=shape, numeric=True)
    check_op(layer_norm, draw(*x), normalized_shape=shape, eps=0.1, numeric=True)
    check_op(rms_norm, draw(*x), weights[0], normalized_shape=shape, numeric=True)
    check_op(rms_norm, draw(*x), normalized_shape=shape, eps=0.1, numeric=True)


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 4), (2, 3, 2, 2), (0, 3, 2), (1, 2, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_channels_by_definition(shape, training):
    channels = shape[1]
    x, weights = draw(*shape), (draw(channels, seed=1), draw(channels, seed=2))
    check_op(batch_norm, x, *weights, *running(channels), training=training, numeric=True)
    check_op(batch_norm, x, training=training, eps=0.1, numeric=True)
    check_op(batch_norm, last(x), weights[0], None, *running(channels), training=training, momentum=0.3)


@pytest.mark.parametrize("training", [True, False])
def test_strided_statistics(training):
    """Weights and running statistics with gaps between their elements."""
    weight, bias, mean, variance = (a.repeat(2)[::2] for a in (draw(3, seed=1), draw(3, seed=2), *running(3)))
    check_op(batch_norm, draw(4, 3, 5), weight, bias, mean, variance, training=training, dtypes=["float32"])
