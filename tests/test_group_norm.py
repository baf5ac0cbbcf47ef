"""Group norm and instance norm: definitions, kernels branch by branch, errors; drop-ins are in test_torch_modules.py."""

import numpy as np
import pytest
from gpulayers.kernels.triton import _configs, _group_norm, _tile
from halves import check_op
from test_norm import against_torch, draw, last, running

import gpulayers as gl
from gpulayers import dispatch
from gpulayers.arrays import bfloat16
from gpulayers.ops.norm import group_norm, instance_norm
from gpulayers.testing import _multiprocessors, check_layer
from gpulayers.testing.interpreter import interpreting

torch = pytest.importorskip("torch")
gt = pytest.importorskip("gpulayers.torch")
F = torch.nn.functional
NEEDS = ("x", "weight", "bias")


def weights(channels: int) -> tuple[np.ndarray, np.ndarray]:
    return draw(channels, seed=1), draw(channels, seed=2)


# --- the definitions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape, groups", [((2, 6), 2), ((2, 4, 3), 4), ((1, 6, 2, 3), 3), ((2, 2, 1, 2, 2, 2), 1)])
def test_groups_by_definition(shape, groups):
    check_op(group_norm, draw(*shape), *weights(shape[1]), num_groups=groups, numeric=True, backends=("definition",))
    check_op(group_norm, draw(*shape), num_groups=groups, eps=0.1, numeric=True, backends=("definition",))


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 2, 2), (1, 2, 2, 1, 2)])
@pytest.mark.parametrize("by_input", [True, False])
def test_instances_by_definition(shape, by_input):
    given = draw(*shape), *weights(shape[1]), *running(shape[1])
    check_op(instance_norm, *given, use_input_stats=by_input, numeric=True, backends=("definition",))


@pytest.mark.parametrize("shape, groups", [((3, 6), 2), ((2, 6, 5), 6), ((2, 6, 3, 2), 3), ((0, 6, 3), 2)])
def test_groups_are_torchs(shape, groups):
    given = draw(*shape), *weights(shape[1])
    theirs = lambda x, w, b: F.group_norm(x, groups, w, b, eps=0.01)  # noqa: E731
    against_torch(group_norm, given, theirs, NEEDS, num_groups=groups, eps=0.01)


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 2, 3, 2), (2, 3, 2, 1, 3)])
@pytest.mark.parametrize("by_input, tracked", [(True, True), (True, False), (False, True)])
def test_instances_are_torchs(shape, by_input, tracked):
    given = draw(*shape), *weights(shape[1]), *(running(shape[1]) if tracked else (None, None))

    def theirs(x, w, b, m, v):
        return F.instance_norm(x, m, v, w, b, by_input, 0.3)

    against_torch(instance_norm, given, theirs, NEEDS, use_input_stats=by_input, momentum=0.3)


# --- the kernels, branch by branch -----------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Names of the Triton kernels that were launched, in tiles of 64 elements."""
    names, launch = set(), _tile.launch

    def note(kernel, *args, **options):
        names.add(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(_tile, "launch", note)
    for choice in (*_group_norm.FORWARD, *_group_norm.BACKWARD):
        monkeypatch.setitem(_configs._replaced, choice.name, (_configs.Row(None, 64, 4),))
        choice._known.clear()
    yield names
    for choice in (*_group_norm.FORWARD, *_group_norm.BACKWARD):
        choice._known.clear()


ALONE = {"_group_norm_forward_kernel", "_group_norm_backward_kernel", "_norm_finalise_kernel"}
SHARED = {f"_group_norm_{k}_kernel" for k in ("moments", "apply", "sums", "gradient")}
HALF = dict(dtypes=["float32", "float16"], dys=["transposed"])
OTHER = dict(dtypes=["float32", "bfloat16"], dys=["dense"])


@pytest.mark.parametrize("shape, groups", [((2, 6, 3, 5), 2), ((3, 4), 2), ((2, 3, 70), 1), ((2, 4, 3, 2, 2), 4)])
def test_a_program_a_group(shape, groups, launched):
    """Several channels a tile, several tiles a channel, no pixels at all."""
    ran = check_op(group_norm, draw(*shape), *weights(shape[1]), num_groups=groups, **HALF)
    assert {"numpy", "aten", "triton"} <= set(ran)
    assert launched - {"_copy_kernel"} == ALONE


@pytest.mark.parametrize("shape, groups", [((1, 6, 5, 25), 2), ((1, 2, 400), 1)])
def test_several_programs_a_group(shape, groups, launched):
    """Few and large groups: one channel a program, and several programs a channel."""
    check_op(group_norm, draw(*shape), *weights(shape[1]), num_groups=groups, **HALF)
    assert launched - {"_copy_kernel"} == SHARED | {"_norm_finalise_kernel"}


@pytest.mark.parametrize(
    "shape, groups", [((1, 70, 2, 2), 7), ((1, 140, 2, 1), 2), ((1, 4, 9, 7), 4), ((2, 6, 2, 3, 2), 3)]
)
def test_channels_last(shape, groups, launched):
    """Groups that cross no tile, one, or several; programs share out the pixels."""
    ran = check_op(group_norm, last(draw(*shape)), *weights(shape[1]), num_groups=groups, **HALF)
    assert {"numpy", "triton"} <= set(ran)
    assert launched - {"_copy_kernel"} == SHARED | {"_norm_finalise_kernel"}


def test_instances(launched):
    """Both memory orders, with running statistics that have gaps, and by the running ones."""
    mean, variance = (a.repeat(2)[::2] for a in running(4))
    for x, by_input in ((draw(1, 4, 3, 2), True), (last(draw(2, 4, 3, 2)), True), (draw(1, 4, 3, 2), False)):
        given = x, *weights(4), mean.copy(), variance
        ran = check_op(instance_norm, *given, use_input_stats=by_input, momentum=0.3, **OTHER)
        assert {"numpy", "triton"} <= set(ran)
    assert launched >= ALONE | SHARED | {"_instance_norm_running_kernel"}
    for by_input, gradients in ((True, True), (False, False)):  # torch's has none of running statistics
        options = dict(use_input_stats=by_input, dtypes=["float32"], dys=["dense"])
        assert ("aten" in check_op(instance_norm, draw(2, 4, 3, 2), None, None, *running(4), **options)) == gradients
    given = draw(20, 2, 3), None, None, mean[:2], variance[:2]
    check_op(instance_norm, *given, dtypes=["float16"], needs=[], backends=("triton",))


@pytest.mark.parametrize(
    "op, given, options",
    [
        (group_norm, (draw(3, 8, 5), *weights(8)), {"num_groups": 4}),
        (group_norm, (draw(1, 4, 3000), *weights(4)), {"num_groups": 2}),
        (instance_norm, (last(draw(2, 4, 3, 40)), None, None, *running(4)), {}),
    ],
    ids=["a program a group", "several programs a group", "channels-last"],
)
def test_on_a_large_gpu(op, given, options):
    """As for 132 multiprocessors."""
    with interpreting(_tile.Device(90, 132, 232448), races=False) as session:
        check_op(op, *given, dtypes=["float32"], dys=["dense"], backends=("triton",), **options)
    assert {(each.kernel, 132) for each in session.launches} <= _multiprocessors.launched


def test_what_is_empty():
    for shape in ((0, 4, 3), (2, 4, 0), (0, 4)):
        check_op(group_norm, draw(*shape), *weights(4), num_groups=2, dtypes=["float32"], dys=["dense"])
    for by_input in (True, False):
        given = draw(0, 4, 3), *weights(4), *running(4)
        check_op(instance_norm, *given, use_input_stats=by_input, dtypes=["float32"], dys=["dense"])


def test_strided_and_mixed():
    """Gaps between pixels; 16-bit x with float32 weights."""
    options = dict(num_groups=2, dys=["dense", "expanded"], dtypes=["float32"])
    check_op(group_norm, draw(4, 6, 5, 3)[::2, :, 1:], *(a.repeat(2)[::2] for a in weights(6)), **options)
    wide = [a.astype(np.float32) for a in weights(6)]
    for x in (draw(2, 6, 3, 2), last(draw(2, 6, 3, 2))):
        check_op(group_norm, x.astype(bfloat16), *wide, **options)


@pytest.mark.parametrize("shape", [(2, 4, 12, 11), (1, 2, 1100)])
@pytest.mark.parametrize("turn", [lambda x: x, last], ids=["row-major", "channels-last"])
def test_a_large_mean_and_a_small_deviation(shape, turn):
    """E[x²] − E[x]², or a mean folded into a shift, would have lost every digit here."""
    x = turn((draw(*shape, seed=8) * 0.01 + 1e4).astype(np.float32))
    options = dict(dtypes=["float32"], dys=["dense"])
    assert "triton" in check_op(group_norm, x, *weights(shape[1]), num_groups=2, **options)
    check_op(instance_norm, x, *weights(shape[1]), **options)


def test_a_group_of_one_has_no_gradient():
    """g − ḡ is 0 only where both are one number, though products go unrounded into sums on a GPU."""
    options = dict(num_groups=4, dtypes=["float32"], dys=["dense"])
    check_op(group_norm, draw(3, 4), *weights(4), **options)
    with interpreting(fused=True):
        check_op(group_norm, draw(3, 4), *weights(4), backends=("triton",), **options)


def test_not_a_number_stays_in_its_group():
    x = draw(2, 4, 3).astype(np.float32)
    x[0, 1, 2] = np.nan
    y = group_norm(x, num_groups=2)
    np.testing.assert_array_equal(np.isnan(y), np.repeat([[True, True, False, False], [False] * 4], 3).reshape(2, 4, 3))


# --- layers and modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer, shape",
    [
        (gl.GroupNorm(2, 4), (None, 4, 3, 2)),
        (gl.InstanceNorm1d(3, affine=True, track_running_stats=True), (None, 3, 4)),
        (gl.InstanceNorm3d(2), (None, 2, 2, 1, 3)),
        (gl.LocalResponseNorm(3), (None, 4, 3)),
        (gl.BatchNorm3d(3), (None, 3, 2, 1, 2)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_layers(layer, shape):
    check_layer(layer, shape)


def test_running_statistics_of_an_instance_norm():
    """They move in training, hold in evaluation and where it is frozen; momentum None leaves them, as torch."""
    x, layer = draw(3, 2, 5).astype(np.float32), gl.InstanceNorm1d(2, momentum=0.3, track_running_stats=True)
    theirs = torch.nn.InstanceNorm1d(2, momentum=0.3, track_running_stats=True)
    for training in (True, False):
        layer.train(training), theirs.train(training)
        np.testing.assert_allclose(layer(x), theirs(torch.tensor(x)), rtol=1e-4, atol=1e-5)
        for name in ("running_mean", "running_var"):
            np.testing.assert_allclose(layer.state_dict()[name], theirs.state_dict()[name], rtol=1e-5)
    layer.train().trainable = False
    before = layer.running_mean.copy()
    layer(x)
    np.testing.assert_array_equal(layer.running_mean, before)


def test_volumes_in_a_row_are_fused():
    model, x = torch.nn.Sequential(torch.nn.BatchNorm3d(2), torch.nn.ReLU()), torch.tensor(draw(2, 2, 2, 1, 3))
    wanted = model.double()(x)
    model[0].reset_running_stats()
    assert gt.patch(model, fuse=True).fused == {"": ("0 → 1",)}
    torch.testing.assert_close(model(x), wanted)


@pytest.mark.parametrize("kind", ["BatchNorm", "InstanceNorm"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_lazy_modules(kind, axes):
    """Their first call makes them drop-ins, which compute as torch's, with its weights and statistics."""
    x, options = torch.tensor(draw(2, 3, *[2, 3, 2][:axes])), dict(affine=True, track_running_stats=True)
    ours, theirs = (getattr(m, f"Lazy{kind}{axes}d")(**options).double() for m in (gt, torch.nn))
    assert all(type(ours).__mro__[i].__module__.startswith("gpulayers.torch.") for i in (0, 1))
    torch.testing.assert_close(ours(x), theirs(x))
    assert type(ours) is getattr(gt, f"{kind}{axes}d")
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    plain = getattr(torch.nn, f"Lazy{kind}{axes}d")(**options).double()
    plain(x)
    assert set(gt.patch(plain).replaced) == {""} and type(plain) is type(ours)


# --- errors ----------------------------------------------------------------------------------------------------------

X = draw(3, 4, 2)
W = draw(4)
WRONG = {
    "rank": (group_norm, (W,), dict(num_groups=2), ValueError, "x.shape = (N, C, *spatial)"),
    "groups": (group_norm, (X,), dict(num_groups=3), RuntimeError, "num_groups ≥ 1 divides C; got 3 with C = 4"),
    "no groups": (group_norm, (X,), dict(num_groups=0), RuntimeError, "num_groups ≥ 1 divides C"),
    "kind": (group_norm, (X,), dict(num_groups=2.0), TypeError, "num_groups: the rule is an integer; got 2.0"),
    "weight": (group_norm, (X, W[:2]), dict(num_groups=2), RuntimeError, "weight.shape = (C,) = [4]; got [2]"),
    "one value": (group_norm, (draw(1, 4),), dict(num_groups=4), ValueError, "more than one value"),
    "one pixel": (instance_norm, (X[..., :1],), {}, ValueError, "∏ spatial > 1"),
    "no statistics": (instance_norm, (X,), dict(use_input_stats=False), RuntimeError, "given where use_input_stats"),
    "one statistic": (instance_norm, (X, None, None, W), {}, ValueError, "both or neither"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors(case):
    op, inputs, options, error, text = WRONG[case]
    with pytest.raises(error) as raised:
        op(*inputs, **options)
    assert str(raised.value).startswith(f"{op.name}: ")
    assert text in str(raised.value)


@pytest.mark.parametrize("x", [draw(1, 4, 5, 30), last(draw(1, 70, 4, 5))], ids=["row-major", "channels-last"])
def test_shared_groups_take_two_launches_and_three(x, launched):
    """And give the same bits again; what is not a number stays in its group, though its tile has others."""
    x, runs = x.astype(np.float32), []
    x[0, -1, 2, 2] = np.nan
    given = x, *(w.astype(np.float32) for w in weights(x.shape[1]))
    for _ in range(2):
        with (
            dispatch.policy(simulate=("triton",), strict=True),
            dispatch.only("triton"),
            interpreting(_tile.Device(90, 4, 232448), races=False) as session,
        ):
            y, call = group_norm.record(*given, needs=NEEDS, num_groups=2)
            forward = len(session.launches)
            runs.append([y, *call.backward(x)[:3]])
    assert (forward, len(session.launches)) == (2, 5)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*runs))
    np.testing.assert_array_equal(np.isnan(y), np.isnan(runs[0][1]))
    assert np.isnan(y[0].reshape(2, -1)).all(1).tolist() == [False, True] and np.isnan(y).mean() == 0.5
