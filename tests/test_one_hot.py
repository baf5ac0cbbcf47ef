import numpy as np
import pytest
import torch
import torch.nn.functional as F

import gpulayers.torch as gt
from gpulayers.ops.embedding import one_hot
from gpulayers.testing.check_op import check_op
from gpulayers.testing.interpreter import interpreting


@pytest.mark.parametrize("shape, classes", [((5,), 7), ((), 3), ((2, 3), 300), ((0, 2), 4), ((700,), 2)])
def test_kernels(shape, classes):
    indices = np.random.default_rng(0).integers(0, classes, shape)
    assert {"definition", "numpy", "triton"} <= set(check_op(one_hot, indices, num_classes=classes))
    np.testing.assert_array_equal(one_hot(indices, num_classes=classes), np.eye(classes, dtype=np.int64)[indices])


def test_narrow_indices_and_gaps():
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4)[:, ::2]
    check_op(one_hot, indices, num_classes=12)


def test_torch():
    x = torch.tensor([[1, 0], [4, 2]])
    for classes in (-1, 5, 9):
        assert torch.equal(gt.functional.one_hot(x, classes), F.one_hot(x, classes))
    assert torch.equal(gt.functional.one_hot(x[:0], 3), F.one_hot(x[:0], 3))
    compiled = torch.compile(gt.functional.one_hot, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, 5), F.one_hot(x, 5))
    calls = ((x, 3), (x - 1, 5), (x.int(), 5), (x, 0), (x[:0], -1), (x - 1, -1), ([1], 2), (x, 2.0))
    for call in calls:
        with pytest.raises((RuntimeError, TypeError)) as theirs:
            F.one_hot(*call)
        with pytest.raises(type(theirs.value)) as ours:
            gt.functional.one_hot(*call)
        assert str(ours.value).splitlines()[0] == str(theirs.value).splitlines()[0]


def test_no_class_on_a_gpu_is_a_row_of_zeros():
    from gpulayers.kernels.triton import embedding as kernels

    with interpreting():
        (y,), _ = kernels.one_hot_forward(
            torch.tensor([1, 5, -1]), num_classes=3, empty=lambda s, d: torch.empty(s, dtype=torch.int64)
        )
    assert y.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]


def test_errors():
    with pytest.raises(IndexError, match="one_hot: indices: the rule is 0 ≤ index < num_classes = 3; got 3"):
        one_hot(np.arange(4), num_classes=3)
    with pytest.raises(ValueError, match="one_hot: num_classes: the rule is num_classes ≥ 1; got 0"):
        one_hot(np.arange(4), num_classes=0)
    with pytest.raises(TypeError, match="one_hot: indices: the rule is an integer dtype; got float64"):
        one_hot(np.ones(4), num_classes=3)
