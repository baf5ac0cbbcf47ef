"""Layers of one's own as one Triton kernel each way: what is written, who runs it, and whether it is right."""

import ast
import importlib.util
import math
import pathlib

import numpy as np
import pytest
from check_fuse import judged, wide
from fused_layers import (
    Backwards,
    Centred,
    ChannelNorm,
    Moments,
    OfChannels,
    Product,
    SwiGLU,
    Swish,
    centred,
    centred_gradient,
    gated,
    gated_gradient,
    of_channels,
    of_channels_gradient,
    swish,
    swish_gradient,
)
from gallery import ENTRIES, importable
from layer_mutants import RIGHT

import gpulayers as gl
from gpulayers import dispatch
from gpulayers.arrays import Spec, bfloat16, float32
from gpulayers.cli import main
from gpulayers.fusing import FusionError, by_hand, fuse, fusion
from gpulayers.testing import audit_op, check_layer, check_op
from gpulayers.testing.interpreter import interpreting


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Kernels are written where nobody else looks."""
    monkeypatch.setenv("GPULAYERS_CACHE", str(tmp_path_factory.getbasetemp() / "gpulayers"))


@pytest.fixture
def triton():
    """Within, only Triton computes, interpreted; the session lists its launches."""
    with interpreting() as session, dispatch.policy(simulate=("triton",)), gl.only("triton"):
        yield session


def arrays_for(layer: gl.Layer, *shapes: tuple, seed: int = 0) -> list[np.ndarray]:
    """Inputs, and the weights moved from where they start, in float64."""
    rng = np.random.default_rng(seed)
    layer.ensure_built(*((None, *s[1:]) for s in shapes))
    weights = layer.named_weights().values()
    return [*map(rng.standard_normal, shapes), *(w.data + 0.3 * rng.standard_normal(w.shape) for w in weights)]


def test_text_has_the_authors_lines_and_names():
    text = fusion(Swish(), (None, 8)).text
    ast.parse(text)
    for line in ("# s = 1 / (1 + np.exp(-self.beta * x))", "s = 1 / (1 + tl.exp(-beta * x))", "y = x * s"):
        assert f"    {line}\n" in text
    assert "import gpulayers" not in text


def test_the_page_shows_what_is_written():
    """docs/fuse.md has the kernels as they are."""
    page = (pathlib.Path(__file__).parents[1] / "docs/fuse.md").read_text()
    assert fusion(Swish(), (None, 64)).text.partition("import triton")[2] in page


@pytest.mark.parametrize("shape", [(5, 7), (0, 3), (2, 3, 1), (3, 2, 130)])
@pytest.mark.parametrize("make", [Swish, Centred])
def test_kernels_give_what_the_array_code_gives(make, shape):
    layer = make()
    dtypes = ["float32", "float16", "bfloat16"] if shape == (5, 7) else ["float32"]
    op = fusion(layer, (None, *shape[1:])).op
    assert check_op(op, *arrays_for(layer, shape), backends=["definition", "triton"], dtypes=dtypes)


def test_a_fused_layer_runs_its_kernels(triton):
    layer, own = fuse(Swish(), (None, 5)), Swish()
    x = np.random.default_rng(1).standard_normal((4, 5)).astype(np.float32)
    y = layer(x)
    dx = layer.backward(y)
    assert [launch.kernel for launch in triton.launches] == [
        "swish_forward",
        "swish_backward",
        "swish_backward_numbers",
    ]
    with dispatch.policy(simulate=()), gl.only("definition"):
        np.testing.assert_allclose(y, own(x), rtol=1e-6)
        np.testing.assert_allclose(dx, own.backward(y), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.beta.grad, own.beta.grad, rtol=1e-5)


def test_on_a_cpu_the_array_code_runs():
    layer = fuse(Swish(), (None, 5))
    x = np.ones((2, 5), np.float64)
    assert np.array_equal(layer(x), Swish()(x))
    backend, reasons = gl.explain(fusion(layer, (None, 5)).op, x, layer.beta.data)
    assert backend == "definition" and reasons["triton"] == "its kernels take CUDA arrays"


def test_check_layer_runs_the_kernels_of_a_fused_layer():
    with interpreting() as session:
        check_layer(fuse(Centred()), (None, 6), dtypes=["float32"], backends=["triton"])
    assert {launch.kernel for launch in session.launches} >= {"centred_forward", "centred_backward"}


def test_a_setting_that_changes_is_seen(triton):
    layer = fuse(Centred(), (None, 4))
    x = np.random.default_rng(2).standard_normal((3, 4)).astype(np.float32)
    before = layer(x)
    layer.scale = 4.0
    np.testing.assert_allclose(layer(x), 2 * before, rtol=1e-6)


def test_a_class_may_say_that_it_is_fused(triton):
    class Fused(Swish):
        fused = True

    Fused()(np.ones((2, 3), np.float32))
    assert [launch.kernel for launch in triton.launches] == ["fused_forward"]


def test_a_refusal_names_the_line():
    with pytest.raises(
        FusionError, match=r"fused_layers.py:\d+: `return x @ self.w`: matmul .* Write instead: .*gl.Linear"
    ):
        fuse(Product(), (None, 4))


@pytest.mark.parametrize(
    ("make", "shape"), [(Swish, (512, 1000)), (Centred, (512, 8192)), (ChannelNorm, (16, 96, 56, 56))]
)
def test_machine_code(make, shape):
    layer = make()
    op = fusion(layer, (None, *shape[1:])).op
    weights = [Spec(w.shape, float32) for w in layer.named_weights().values()]
    for report in audit_op(op, Spec(shape, bfloat16), *weights, archs=[90]):
        assert not report.spills


# --- layers that others wrote ----------------------------------------------------------------------------------------

with importable():
    OTHERS = {name: (make, inputs) for name, make, inputs in RIGHT}
    OTHERS |= {f"gallery.{e.name}": (e.layer(), (e.input_shape,)) for e in ENTRIES}
FUSED = ["Swish", "Scale", "Shift", "Channels", "Rectified", "Distance", "Clipped"]
FUSED += ["gallery.Swish", "gallery.Symlog", "gallery.Antirectifier"]
"""Those of them that are element-wise, or reduce along the last axes."""
REFUSED = ["Largest", "LargestOfTies", "Middle", "Ordered", "Pairs", "Table", "gallery.BlurPool"]
"""Those that sort, fill arrays of NumPy's own, or only gather, or move more than they compute; the others are cut."""


def shapes_and_dtypes(inputs):
    shapes = [x if isinstance(x, tuple) else x.shape for x in inputs]
    return shapes, [float32 if isinstance(x, tuple) or x.dtype.kind == "f" else x.dtype for x in inputs]


def made(name: str) -> gl.Layer:
    make = OTHERS[name][0]
    return make if isinstance(make, gl.Layer) else make()


@pytest.mark.parametrize("name", FUSED)
def test_layers_of_others(name):
    layer, (shapes, _) = made(name), shapes_and_dtypes(OTHERS[name][1])
    xs = arrays_for(layer, *(tuple(3 if n is None else n for n in s) for s in shapes))
    for training in (True, False):
        op = fusion(layer, *shapes, training=training).op
    check_op(op, *xs, backends=["triton"], dtypes=["float32", "bfloat16"])


@pytest.mark.parametrize("name", REFUSED)
def test_others_are_refused_with_their_line(name):
    shapes, dtypes = shapes_and_dtypes(OTHERS[name][1])
    with pytest.raises(FusionError) as refused:
        for training in (True, False):
            fusion(made(name), *shapes, training=training, dtypes=dtypes)
    assert refused.value.place is not None and refused.value.place.line


@pytest.mark.parametrize("seed", [1, 5, 8, 13])
def test_random_layers(seed, tmp_path):
    assert judged(seed, tmp_path, ("float32",)) == "fused"


def test_rows_too_wide_for_registers():
    """They are walked; with a weight for each column in two kernels."""
    layer = Centred()
    op = fusion(layer, (None, 37)).op
    with interpreting() as session, wide(walked=16):
        check_op(op, *arrays_for(layer, (5, 37)), backends=["triton"], dtypes=["float32", "float16"])
    ran = {launch.kernel.removeprefix("centred_") for launch in session.launches}
    assert ran >= {"forward_looped", "backward_rows", "backward_tiles", "backward_columns"}


def test_what_forward_keeps_for_backward():
    """A value of a row where rows are long; an output where that spares reductions; else nothing."""
    assert "Forward keeps" not in fusion(gl.LayerNorm(4), (None, 4)).text
    assert "Forward keeps mean, rstd" in fusion(gl.LayerNorm(1024), (None, 1024)).text
    softmax = fusion(gl.Softmax(-1), (None, 4))
    assert "Backward reads y" in softmax.text and softmax.op.rule(Spec((2, 4), float32), needs=("x",)).saved.keys() == {
        "y"
    }
    kept = fusion(gl.RMSNorm(130), (None, 130)).op
    check_op(
        kept, *arrays_for(gl.RMSNorm(130), (3, 130)), backends=["definition", "triton"], dtypes=["float32", "bfloat16"]
    )


@pytest.mark.parametrize("shape", [(4, 19), (2, 3, 8)])
def test_several_inputs_and_outputs(shape):
    layer = Moments()
    op = fusion(layer, (None, *shape[1:]), (None, *shape[1:])).op
    assert op.inputs == ("x0", "x1") and len(op.rule(*[Spec(shape, float32)] * 2).outputs) == 2
    check_op(op, *arrays_for(layer, shape, shape), backends=["definition", "triton"], dtypes=["float32", "float16"])
    with wide(walked=8):
        check_op(op, *arrays_for(layer, shape, shape), backends=["triton"], dtypes=["float32"])


@pytest.mark.parametrize("shape", [(3, 8), (0, 6), (2, 3, 10)])
def test_parts_are_loaded_and_stored_in_place(shape):
    """Slices of what is given, and what is joined along the last axis."""
    op = fusion(SwiGLU(), (None, *shape[1:])).op
    with interpreting() as session:
        check_op(op, *arrays_for(SwiGLU(), shape), backends=["definition", "triton"], dtypes=["float32"])
    if 0 not in shape:
        assert {launch.kernel for launch in session.launches} - {"_copy_kernel"} == {
            "swi_glu_forward",
            "swi_glu_backward",
        }


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (0, 2, 3, 3)])
def test_weights_of_channels(shape):
    """Their gradients are sums over the images and the pixels."""
    op = fusion(OfChannels(), (None, *shape[1:])).op
    check_op(op, *arrays_for(OfChannels(), shape), backends=["definition", "triton"], dtypes=["float32", "bfloat16"])
    with wide(walked=4):
        check_op(op, *arrays_for(OfChannels(), shape), backends=["triton"], dtypes=["float32"])


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 4, 3, 5), (0, 3, 2, 2)])
def test_sums_along_an_axis_between_others(shape):
    """Rows lie side by side, and are loaded so."""
    made = fusion(ChannelNorm(), (None, *shape[1:]))
    beside = math.prod(shape[2:])
    assert f"at = row // {beside} * {beside} * N + row % {beside}" in made.text
    xs = arrays_for(ChannelNorm(), shape)
    assert check_op(made.op, *xs, backends=["definition", "triton"], dtypes=["float32", "bfloat16"])
    with wide(walked=64):
        check_op(made.op, *xs, backends=["triton"], dtypes=["float32"])


def test_launchers_by_hand_of_rows_side_by_side(tmp_path, triton):
    torch = pytest.importorskip("torch")
    path, made = tmp_path / "channel_norm_by_hand.py", fusion(ChannelNorm(), (None, 5, 3, 4))
    path.write_text(by_hand(made))
    xs = [x.astype(np.float32) for x in arrays_for(ChannelNorm(), (2, 5, 3, 4))]
    y = module_of(path).triton_forward(*map(torch.from_numpy, xs), empty=lambda shape, dtype: torch.empty(shape))
    np.testing.assert_allclose(y.numpy(), made.op(*xs), rtol=1e-6)


def test_cumulative_sums_from_the_end():
    op = fusion(Backwards(), (None, 11)).op
    check_op(op, *arrays_for(Backwards(), (3, 11)), backends=["definition", "triton"], dtypes=["float32"])
    wide_op = fusion(Backwards(), (None, 1 << 17)).op
    with dispatch.policy(simulate=("triton",)):
        x = Spec((2, 1 << 17), float32)
        reason = gl.explain(wide_op, x, Spec((), float32), needs=("x",))[1]["triton"]
    assert "too wide for registers" in reason


@pytest.mark.parametrize("cut", [np.s_[:, :5], np.s_[::2], np.s_[:, ::2], np.s_[:]])
def test_strided_inputs(cut, triton):
    layer, own = fuse(Swish(), (None, 5)), Swish()
    x = np.random.default_rng(3).standard_normal((6, 10)).astype(np.float32)[cut][:, :5]
    y = layer(x)
    dx = layer.backward(y[::-1][::-1])
    with dispatch.policy(simulate=()), gl.only("definition"):
        np.testing.assert_allclose(y, own(x), rtol=1e-6)
        np.testing.assert_allclose(dx, own.backward(y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [Swish, Centred])
def test_calls_are_taped(make, monkeypatch):
    """What a tape gives the driver is what the launcher gives it."""
    torch = pytest.importorskip("torch")
    from gpulayers.testing.check_tape import check_tape
    from gpulayers.testing.null_driver import null_driver, same_memory

    if torch.cuda.is_available():
        pytest.skip("the null driver would stand for the GPU's own")
    monkeypatch.setattr(dispatch, "_plans", {})
    layer = make()
    op = fusion(layer, (None, 8)).op
    weights = [Spec(w.shape, float32) for w in layer.named_weights().values()]
    with null_driver(compiled=False) as driver, same_memory() as memory:
        states = check_tape(driver, memory, op, [Spec((6, 8), bfloat16), *weights], op.inputs)
    assert states == {"forward": "taped", "backward": "taped"}


# --- by hand, from a shell, in torch ---------------------------------------------------------------------------------

SWISH = f"{pathlib.Path(__file__).parents[1] / 'examples/custom_layers/swish.py'}:Swish"


def module_of(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BY_HAND = [
    (Swish, swish, swish_gradient, (6, 5)),
    (Centred, centred, centred_gradient, (6, 5)),
    (SwiGLU, gated, gated_gradient, (3, 8)),
    (OfChannels, of_channels, of_channels_gradient, (2, 3, 2, 4)),
]


@pytest.mark.parametrize(("make", "forward", "backward", "shape"), BY_HAND, ids=lambda v: getattr(v, "__name__", ""))
def test_the_file_by_hand_has_launchers_for_an_op(make, forward, backward, shape, tmp_path):
    layer = make()
    path = tmp_path / f"{make.__name__}_by_hand.py"
    path.write_text(by_hand(fusion(layer, (None, *shape[1:]))))
    module = module_of(path)
    of_y = (lambda x: (*x[:-1], x[-1] // 2)) if make is SwiGLU else None
    op = gl.op(path.stem, forward, backward, shape=of_y, triton=(module.triton_forward, module.triton_backward))
    xs = arrays_for(layer, shape)
    assert check_op(op, *xs, backends=["triton"], dtypes=["float32"], dys=["dense"]) == ["triton"]


def test_from_a_shell(tmp_path, capsys):
    out = tmp_path / "kernel.py"
    assert main(["fuse", SWISH, "--out", str(out)]) == 0
    assert "def triton_backward(dy, x, beta, *, empty):" in out.read_text()
    assert main(["fuse", SWISH, "--out", str(out)]) == 2 and "exists" in capsys.readouterr().err
    assert main(["check", SWISH, "--dtypes", "float32"]) == 0
    assert "gl.fuse makes it one Triton kernel each way" in capsys.readouterr().out
    maxout = SWISH.replace("swish", "maxout").replace("Swish", "Maxout")
    assert main(["fuse", maxout]) == 0 and "def launch_maxout_dz(v9, y, dy, *, empty):" in capsys.readouterr().out
    assert main(["check", maxout, "--dtypes", "float32"]) == 0
    assert "gl.fuse cuts it into 2 Triton kernels, with 2 ops between them" in capsys.readouterr().out
    assert main(["fuse", SWISH.replace("swish", "blur_pool").replace("Swish", "BlurPool")]) == 2
    assert "blur_pool.py:26" in capsys.readouterr().err


def test_in_torch(triton):
    torch = pytest.importorskip("torch")
    gltorch = pytest.importorskip("gpulayers.torch")
    module, own = gltorch.wrap(Swish(), (None, 4), fuse=True), gltorch.wrap(Swish(), (None, 4))
    xs = [torch.linspace(-2, 2, 12).reshape(3, 4).requires_grad_() for _ in range(2)]
    module(xs[0]).square().sum().backward()
    assert len(triton.launches) == 3
    with dispatch.policy(simulate=()), gl.only("definition"):
        own(xs[1]).square().sum().backward()
    torch.testing.assert_close(xs[0].grad, xs[1].grad)
    torch.testing.assert_close(module.beta.grad, own.beta.grad)


def test_a_matrix_product_is_refused_by_wrap_too():
    gltorch = pytest.importorskip("gpulayers.torch")
    with pytest.raises(FusionError, match="matmul"):
        gltorch.wrap(Product(), (None, 4), fuse=True)
