"""Layers read by running them on arrays that record: what the graph computes is what the layer computes, or it is refused."""

import pytest
from recorded.array_layers import CASES, DTYPES

from gpulayers.export.recording import check_replay, record


@pytest.mark.parametrize("name", CASES)
def test_array_layers(name):
    """Forward, backward, states, at other batch sizes than those that were recorded, in both modes."""
    layer, shapes = CASES[name]
    for training in (True, False):
        recording = record(layer, shapes, training=training, dtypes=DTYPES.get(name, ()))
        assert check_replay(layer, recording, shapes, DTYPES.get(name, ())) < 1e-6
