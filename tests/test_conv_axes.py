"""Convolution of sequences and volumes, and transposed convolution: the same kernels for other axes, in other roles."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from halves import check_op
from torch.utils.flop_counter import FlopCounterMode

import gpulayers as gl
import gpulayers.torch as gt
from gpulayers import dispatch
from gpulayers.arrays import Spec, float32
from gpulayers.definition import ShapeError
from gpulayers.ops.conv import conv, conv_transpose
from gpulayers.testing.check_layer import check_layer
from gpulayers.testing.interpreter import interpreting

TORCHS = {
    conv: [F.conv1d, F.conv2d, F.conv3d],
    conv_transpose: [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d],
}


def draw(*shape, last=False):
    """Random values; ``last``: channels-last in memory."""
    x = np.random.default_rng(list(shape)).standard_normal(shape)
    return np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1) if last else x


def call(op, x, o, kernel, groups=1, last=False):
    """x, weight and bias of one call."""
    weight = (o, x[1] // groups) if op is conv else (x[1], o // groups)
    return [draw(*x, last=last), draw(*weight, *kernel), draw(o)]


OPTIONS = [
    {},
    {"stride": (2, 3, 2), "padding": (1, 2, 1)},
    {"dilation": (2, 1, 2), "padding": (1, 0, 2), "groups": 2},
    {"stride": 2, "dilation": 3, "groups": 4},
    {"stride": (1, 4, 2), "padding": 1, "output_padding": (0, 3, 1)},
    {"dilation": 3, "stride": 2, "padding": 1, "output_padding": 2, "groups": 2},  # beyond the stride
]


def cut(options, axes):
    """Options of three axes for the last so many."""
    return {k: v[-axes:] if isinstance(v, tuple) else v for k, v in options.items()}


@pytest.mark.parametrize("op", [conv, conv_transpose], ids=lambda op: op.name)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_definition_is_torchs(op, axes):
    for number, options in enumerate(OPTIONS):
        options = cut(options, axes)
        if op is conv:
            options.pop("output_padding", None)
        given = call(
            op, (2, 4, *(5, 7, 6)[-axes:]), 8, (2, 3, 2)[-axes:], options.get("groups", 1), last=number % 2 == 1
        )
        y, record = op.record(*given, **options)
        tensors = [torch.from_numpy(a).requires_grad_() for a in given]
        expected = TORCHS[op][axes - 1](*tensors, **options)
        np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12, atol=1e-12)
        dy = draw(*y.shape)
        expected.backward(torch.from_numpy(dy))
        for g, t in zip(record.backward(dy), tensors):
            np.testing.assert_allclose(g, t.grad.numpy(), rtol=1e-12, atol=1e-12)


# --- kernels ---------------------------------------------------------------------------------------------------------

ALL = ["aten", "definition", "numpy", "triton"]
HALF = {False: "float16", True: "bfloat16"}
CALLS = [
    # op, shape of x, channels out, kernel, options
    (conv, (2, 3, 9), 4, (3,), {"padding": 1, "stride": 2}),
    (conv, (1, 20, 7), 18, (2,), {"dilation": 2, "padding": ((2, 1),)}),
    (conv, (2, 4, 8), 8, (3,), {"groups": 4, "padding": "same"}),
    (conv, (2, 3, 4, 5, 3), 4, (2, 3, 2), {"padding": ((1, 0), (0, 2), (1, 1))}),
    (conv, (1, 18, 3, 4, 5), 20, (3, 1, 2), {"stride": (2, 1, 3), "padding": 1, "dilation": (1, 2, 2)}),
    (conv, (1, 32, 4, 3, 4), 17, (1, 1, 1), {}),  # plain, 48 pixels
    (conv, (2, 4, 3, 4, 5), 4, (2, 3, 2), {"groups": 4, "stride": (2, 2, 1), "padding": 1}),
    (conv, (1, 4, 1, 4, 5), 6, (3, 2, 2), {"padding": 1, "groups": 2, "stride": 2}),  # one slice under three taps
    (conv, (1, 20, 1, 4, 5), 18, (3, 1, 1), {"padding": ((1, 1), (0, 0), (0, 0))}),
    (conv_transpose, (2, 3, 5), 4, (3,), {"stride": 2, "output_padding": 1}),
    (conv_transpose, (2, 4, 5, 3), 8, (3, 2), {"groups": 4, "stride": (2, 1), "padding": 1}),
    (conv_transpose, (1, 20, 4, 3), 18, (3, 2), {"padding": ((1, 0), (0, 1)), "dilation": (1, 2)}),
    (conv_transpose, (2, 16, 4, 4), 20, (1, 1), {}),
    (conv_transpose, (1, 17, 2, 3, 2), 8, (2, 3, 2), {"stride": (2, 2, 3), "output_padding": 1, "dilation": (2, 1, 1)}),
    (conv_transpose, (1, 4, 2, 3, 4), 4, (2, 2, 3), {"groups": 4, "dilation": (2, 1, 1), "output_padding": (1, 0, 0)}),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_kernels(number):
    """In one memory order, some in both, with float32 or 16 bits."""
    op, shape, o, kernel, options = CALLS[number]
    for last in (False, True) if number in (3, 6, 13) else (number % 4 < 2,):
        dtype = HALF[last] if (number + last) % 2 else "float32"
        given = call(op, shape, o, kernel, options.get("groups", 1), last)
        served = check_op(op, *given, dtypes=[dtype], dys=["dense" if last else "strided"], **options)
        assert set(served) >= {"numpy", "triton"} and (dtype != "float32" or served == ALL)


def test_what_follows_a_volume():
    """Each channel by itself, both ways: what follows its sums lies in other planes, too."""
    for op in (conv, conv_transpose):
        given = call(op, (2, 4, 3, 4, 5), 4, (3, 1, 2), 4, False)
        check_op(op, *given, groups=4, padding=(1, 0, 0), activation="gelu", dtypes=["float16"], dys=["dense"])


def test_numpy_slices_in_blocks(monkeypatch):
    """Of a volume, a few slices of the output at a time."""
    from gpulayers.kernels.numpy import _conv_volumes

    monkeypatch.setattr(_conv_volumes, "BYTES", 1 << 12)
    for op, options in ((conv, {"padding": 1, "stride": (2, 1, 1)}), (conv_transpose, {"stride": 2, "groups": 2})):
        given = call(op, (2, 4, 7, 5, 4), 6, (3, 2, 2), options.get("groups", 1))
        check_op(op, *given, dtypes=["float32"], dys=["dense"], backends=("numpy",), **options)


def test_any_strides():
    """Volumes whose pixels no one step joins; images of one column, its pixels farther apart than images."""
    x, weight, bias = call(conv, (2, 17, 4, 4, 3), 5, (2, 1, 2))
    how = {"dys": ["transposed"], "backends": ("numpy", "triton")}
    check_op(conv, x[:, :, ::2, ::2], weight, bias, padding=1, dtypes=["float16"], **how)
    moved = x[:1].transpose(0, 1, 4, 2, 3), weight.transpose(0, 1, 3, 2, 4)
    check_op(conv, *moved, bias, dtypes=["bfloat16"], **how)
    check_op(conv, x[:1, :4, :, ::2], draw(4, 1, 2, 2, 2), None, groups=4, dtypes=["float32"], **how)
    check_op(conv, draw(6, 2, 17, 1).transpose(1, 2, 0, 3), draw(5, 17, 2, 1), bias, dtypes=["float16"], **how)


@pytest.mark.parametrize("shape", [(0, 3, 6), (0, 3, 4, 5, 6)])
@pytest.mark.parametrize("op", [conv, conv_transpose], ids=lambda op: op.name)
def test_empty_batch(op, shape):
    given = call(op, shape, 4, (3,) * (len(shape) - 2))
    assert len(check_op(op, *given, dtypes=["float32"])) == 3


@pytest.mark.parametrize("backend", ["numpy", "aten", "triton"])
@pytest.mark.parametrize("op, axes", [(conv, 1), (conv, 3), (conv_transpose, 2), (conv_transpose, 3)])
def test_infinite_pixels(op, axes, backend):
    """At a border and inside: they reach what depends on them, as in the definition, and nothing else."""
    options = {"padding": 1, "stride": 2}
    x, weight, _ = call(op, (2, 3, *(4, 5, 6)[-axes:]), 4, (3,) * axes)
    x.reshape(2, -1)[0, 0], x.reshape(2, -1)[1, -1], x[0, 1][(2,) * axes] = np.inf, np.nan, -np.inf
    dy = draw(*op(x, weight, **options).shape)
    dy[0, 0][(0,) * axes], dy[1, -1][(-1,) * axes] = np.nan, np.inf
    found = {}
    for name in (backend, "definition"):
        put = torch.from_numpy if name == "aten" else np.asarray
        given = [put(a.astype(np.float32)) for a in (x, weight)]
        with interpreting() if name == "triton" else dispatch.only(name), np.errstate(all="ignore"):
            y, record = op.record(*given, **options)
            found[name] = y, *record.backward(put(dy.astype(np.float32)))[:2]
    for mine, true in zip(found[backend], found["definition"]):
        # oneDNN multiplies no padding: where it meets an infinite dy, a weight's gradient is finite there.
        where = np.isfinite(true) if backend == "aten" and true.shape == weight.shape else ...
        np.testing.assert_allclose(np.asarray(mine)[where], true[where], rtol=1e-4, atol=1e-4)
    for true in found["definition"][:2]:
        assert np.isfinite(true).any() and not np.isfinite(true).all()


# --- rules -----------------------------------------------------------------------------------------------------------


def test_sizes_not_known_yet():
    weight = Spec((3, 4, 3), float32)
    assert conv_transpose.rule(Spec((None, 3, None), float32), weight, stride=2).outputs["y"].shape == (None, 4, None)
    assert conv.rule(Spec((None, 4, None), float32), weight).outputs["y"].shape == (None, 3, None)


@pytest.mark.parametrize(
    "shape, options, text",
    [
        ((2, 4, 5, 5), {"padding": "same"}, "padding: the rule is"),
        ((2, 4, 5, 5), {"output_padding": 1}, "output_padding < stride or dilation, (1, 1) or (1, 1); got (1, 1)"),
        ((2, 4, 1, 5), {"padding": 2}, "OH = (H − 1) · 1 − 2 − 2 + 1 · (3 − 1) + 0 + 1 ≥ 1; got H = 1"),
        ((2, 3, 5, 5), {}, "C = weight.shape[0] = 4; got C = 3"),
        ((2, 4, 5, 5), {"groups": 3}, "C a multiple of groups = 3"),
        ((2, 4, 5), {}, "x.shape = (N, C, H, W) where weight.shape = (C, O / groups, kh, kw); got [2, 4, 5]"),
        ((2, 4, 0, 5), {"stride": 2}, "H ≥ 1"),
    ],
)
def test_errors(shape, options, text):
    x, weight = draw(*shape), draw(4, 2, 3, 3)
    with pytest.raises(ShapeError) as raised:
        conv_transpose(x, weight, **options)
    assert text in str(raised.value) and str(raised.value).startswith("conv_transpose: ")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        F.conv_transpose2d(torch.from_numpy(x[0] if x.ndim == 3 else x), torch.from_numpy(weight), **options)


# --- layers ----------------------------------------------------------------------------------------------------------


def test_layer():
    check_layer(gl.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1), (2, 3, 3, 4))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_layers_are_torchs(axes):
    """Their arguments in torch's order; weights, outputs and gradients."""
    x = draw(2, 4, *(4, 5, 6)[-axes:]).astype(np.float32)
    arguments = {f"Conv{axes}d": (4, 6, 3, 2, 1, 1, 2), f"ConvTranspose{axes}d": (4, 6, 3, 2, 1, 1, 2, True, 2)}
    for name, given in arguments.items():
        ours, theirs = getattr(gl, name)(*given), getattr(torch.nn, name)(*given)
        same_layer(ours, theirs, x)


def same_layer(ours, theirs, x):
    state = theirs.state_dict()
    assert {n: w.shape for n, w in ours.named_weights().items()} == {n: tuple(t.shape) for n, t in state.items()}
    bound = float(ours.weight.shape[1] * np.prod(ours.weight.shape[2:])) ** -0.5
    assert bound / 2 < abs(ours.weight.data).max() <= bound and abs(ours.bias.data).max() <= bound
    ours.load_state_dict(state)
    tensor = torch.from_numpy(x).requires_grad_()
    y, expected = ours(x), theirs(tensor)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    assert ours.output_shape((None, *x.shape[1:])) == (None, *y.shape[1:])
    dy = draw(*y.shape).astype(np.float32)
    expected.backward(torch.from_numpy(dy))
    np.testing.assert_allclose(ours.backward(dy), tensor.grad.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.weight.grad, theirs.weight.grad.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("axes", [1, 3])
def test_padding_modes_are_torchs(axes, mode):
    x = draw(2, 3, *(4, 5, 6)[-axes:]).astype(np.float32)
    for padding in ((2, 0, 1)[-axes:], "same"):
        options = {"kernel_size": (3, 1, 4)[-axes:], "padding": padding, "padding_mode": mode}
        ours, theirs = (getattr(nn, f"Conv{axes}d")(3, 4, **options) for nn in (gl, torch.nn))
        same_layer(ours, theirs, x)


def test_layer_errors():
    with pytest.raises(ValueError, match="ConvTranspose2d: padding_mode: the rule is zeros"):
        gl.ConvTranspose2d(3, 4, 3, padding_mode="reflect")
    with pytest.raises(
        RuntimeError, match=r"Conv3d: kernel_size: the rule is kernel_size = \(depth, height, width\), all ≥ 1"
    ):
        gl.Conv3d(3, 4, (2, 2))
    with pytest.raises(
        RuntimeError, match=r"Conv1d: x: the rule is x.shape = \(N, C, L\) where .*; got \[2, 3, 4, 5\]"
    ):
        gl.Conv1d(3, 4, 2)(draw(2, 3, 4, 5).astype(np.float32))
    with pytest.raises(ShapeError, match="Conv1d: padding: the rule is padding < L where it reflects"):
        gl.Conv1d(3, 4, 2, padding=9, padding_mode="reflect").output_shape((None, 3, 5))


# --- torch -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes, transposed", [*itertools.product((1, 2, 3), (False, True))])
def test_lazy_classes(axes, transposed):
    """The first call makes a drop-in of it, as torch's makes one of torch's."""
    name = f"Conv{'Transpose' * transposed}{axes}d"
    ours, theirs = (getattr(m, f"Lazy{name}")(6, 2, stride=2) for m in (gt, torch.nn))
    x = torch.from_numpy(draw(2, 3, *(4, 5, 6)[-axes:])).float()
    theirs(x)
    assert isinstance(ours, getattr(torch.nn, f"Lazy{name}"))
    first = ours(x)
    assert type(ours) is getattr(gt, name) and "Conv" in first.grad_fn.name()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_output_size(axes):
    options = {"kernel_size": 3, "stride": 3, "padding": 1}
    ours, theirs = (getattr(m, f"ConvTranspose{axes}d")(3, 4, **options).double() for m in (gt, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    x = torch.from_numpy(draw(2, 3, *(2, 5, 4)[-axes:]))
    least = theirs(x).shape[2:]
    for size in ([n + 2 for n in least], torch.Size((2, 4, *(n + 1 for n in least)))):
        torch.testing.assert_close(ours(x, output_size=size), theirs(x, output_size=size))
    torch.testing.assert_close(ours(x[0], [n + 1 for n in least]), theirs(x[0], [n + 1 for n in least]))
    for wrong in ([n + 3 for n in least], [1] * (axes + 1)):
        with pytest.raises(ValueError):
            theirs(x, output_size=wrong)
        with pytest.raises(ValueError):
            ours(x, output_size=wrong)


@pytest.mark.parametrize("axes, groups", [(1, 1), (2, 2), (3, 1)])
def test_flops_are_torchs(axes, groups):
    counts = []
    for library in (gt, torch.nn):
        layers = [
            getattr(library, f"{name}{axes}d")(4, 6, 2, stride=2, groups=groups) for name in ("Conv", "ConvTranspose")
        ]
        x = torch.ones(2, 4, *(4, 5, 6)[-axes:], requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            sum(layer(x).sum() for layer in layers).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_patch_serves_them():
    names = [f"Conv{t}{d}d" for t in ("", "Transpose") for d in (1, 2, 3)]
    model = torch.nn.ModuleDict({name: getattr(torch.nn, name)(3, 4, 2) for name in names})
    report = gt.patch(model)
    assert report.replaced == {name: getattr(gt, name) for name in names}
    gt.unpatch(model)
    assert all(type(model[name]) is getattr(torch.nn, name) for name in names)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda f, x, w: f.conv1d(x, w),
        lambda f, x, w: f.conv3d(x, w),
        lambda f, x, w: f.conv2d(x, w, padding=(1, 2, 3)),
        lambda f, x, w: f.conv2d(x, w, stride=0),
        lambda f, x, w: f.conv2d(x, w, padding="full"),
        lambda f, x, w: f.conv2d(x[..., :2, :], w),
        lambda f, x, w: f.conv_transpose2d(x, w),
        lambda f, x, w: f.conv_transpose2d(x, w.transpose(0, 1), padding="same"),
        lambda f, x, w: f.conv_transpose2d(x, w.transpose(0, 1), output_padding=1),
        lambda f, x, w: f.conv_transpose2d(x, w.transpose(0, 1), padding=7),
        lambda f, x, w: f.conv_transpose1d(x, w, groups=2),
        lambda f, x, w: f.conv_transpose3d(x, w.transpose(0, 1)),
    ],
)
def test_wrong_calls_raise_as_torchs(wrong):
    x, w = torch.from_numpy(draw(2, 3, 6, 5)).float(), torch.from_numpy(draw(4, 3, 3, 3)).float()
    with pytest.raises(Exception) as theirs:
        wrong(F, x, w)
    with pytest.raises(Exception) as ours:
        wrong(gt.functional, x, w)
    assert type(ours.value) is type(theirs.value)
