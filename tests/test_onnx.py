"""Models as ONNX: checked by onnx.checker, and run by onnxruntime against the model itself."""

import copy
import json
import pathlib

import gallery
import numpy as np
import pytest
from npm import linked, node, node_modules
from recorded.array_layers import CASES, DTYPES, GatedMerge, Lookup, Maxout, Polar, Swish
from recorded.expressions import RECORDED, SHAPE, Computes
from stacks import Stack

import gpulayers as gl
from gpulayers import cli
from gpulayers.export import ExportError

onnx = pytest.importorskip("onnx", reason='it needs pip install ".[export]"')
onnxruntime = pytest.importorskip("onnxruntime", reason="it needs pip install onnxruntime")
from gpulayers.export.onnx import model_proto  # noqa: E402

TOLERANCE = 1e-5
IMAGE = (None, 2, 6, 7)


def moved(layer, shapes, by=0.3):
    """A copy with weights away from their start."""
    layer = copy.deepcopy(layer)
    layer.ensure_built(*shapes)
    rng = np.random.default_rng(0)
    for w in layer.weights:
        if w.data.dtype.kind == "f":
            w.data = (w.data + by * abs(rng.standard_normal(w.shape))).astype(w.dtype)
    return layer


def held(layer, shapes, integers=0, by=0.3, zeros=False):
    """The proto, whose outputs at two batch sizes are the layer's in evaluation."""
    layer = moved(layer, shapes, by)
    proto = model_proto(layer, shapes)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (5, 1):
        rng = np.random.default_rng(batch)
        xs = [rng.standard_normal([batch, *s[1:]]).astype(np.float32) for s in shapes]
        xs = [rng.integers(0, integers, x.shape) for x in xs] if integers else xs
        with np.errstate(all="ignore"):
            ys = layer.eval().forward(*xs)
        ys = ys if isinstance(ys, tuple) else (ys,)
        found = session.run(None, {i.name: x for i, x in zip(proto.graph.input, xs)})
        assert [y.shape for y in found] == [y.shape for y in ys]
        for got, y in zip(found, ys):
            assert zeros or y.any()
            scale = max(1, abs(y[np.isfinite(y)]).max(initial=0))
            np.testing.assert_allclose(got / scale, y / scale, rtol=0, atol=TOLERANCE)
    return proto


@pytest.mark.parametrize("name", [*CASES, *RECORDED])
def test_recorded_layers_are_local_functions(name):
    layer, shapes = CASES[name] if name in CASES else (Computes(RECORDED[name]), [SHAPE])
    proto = held(layer, shapes, layer.n if name in DTYPES else 0)
    (function,) = proto.functions
    assert function.name == type(layer).__name__ and function.domain == "gpulayers"
    assert all(n.op_type in (function.name, "Identity") for n in proto.graph.node)
    assert proto.opset_import[0].version >= 18


ROW = (None, 6)
NATIVE = {
    "Relu": (gl.ReLUSquared(), ROW), "LeakyRelu": (gl.LeakyReLU(0.2), ROW), "Clip": (gl.Hardtanh(-0.5, 2), ROW),
    "HardSigmoid": (gl.Hardsigmoid(), ROW), "HardSwish": (gl.Hardswish(), ROW), "Shrink": (gl.Softshrink(0.3), ROW),
    "Where": (gl.Threshold(0.1, 3.0), ROW), "Gelu": (gl.GELU("tanh"), ROW), "Mish": (gl.Mish(), ROW),
    "Elu": (gl.ELU(0.5), ROW), "Celu": (gl.CELU(1.5), ROW), "Selu": (gl.SELU(), ROW), "Softplus": (gl.LogSigmoid(), ROW),
    "Softsign": (gl.Softsign(), ROW), "Sub": (gl.Tanhshrink(), ROW), "Split": (gl.GLU(1), IMAGE),
    "Mul": (gl.GEGLU("tanh"), ROW), "Sigmoid": (gl.QuickGELU(), ROW),
    "PRelu": (gl.PReLU(2), IMAGE), "Softmax": (gl.Softmin(1), IMAGE), "LogSoftmax": (gl.LogSoftmax(), ROW),
    "Gemm": (gl.Linear(6, 3, activation="gelu"), ROW), "MatMul": (gl.Linear(7, 3, activation="silu"), IMAGE),
    "LayerNormalization": (gl.LayerNorm((6, 7), bias=False), IMAGE), "BatchNormalization": (gl.BatchNorm2d(2), IMAGE),
    "Conv": (gl.Conv2d(2, 4, 3, stride=(2, 1), padding=((1, 0), (2, 1)), dilation=2, groups=2, activation="silu"), IMAGE),
    "MaxPool": (gl.MaxPool2d(3, 2, 1), IMAGE), "AveragePool": (gl.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "Pad": (gl.ReflectionPad2d((1, 0, 2, 1)), IMAGE), "Reshape": (gl.Flatten(2), IMAGE), "Identity": (gl.Dropout(), ROW),
}  # fmt: skip


AXES = {
    "Conv1d": (gl.Conv1d(2, 4, 3, padding=2, dilation=2, padding_mode="circular"), (None, 2, 6)),
    "Conv3d": (gl.Conv3d(2, 4, 2, stride=(1, 2, 1), padding=((1, 0), (0, 1), (1, 1)), groups=2), (None, 2, 3, 4, 3)),
    "ConvTranspose1d": (gl.ConvTranspose1d(2, 4, 3, 2, output_padding=1), (None, 2, 6)),
    "ConvTranspose2d": (gl.ConvTranspose2d(2, 4, 3, 2, ((1, 0), (2, 1)), 1, 2, dilation=2), IMAGE),
    "ConvTranspose3d": (gl.ConvTranspose3d(2, 1, 2, (1, 2, 1), 1), (None, 2, 3, 4, 3)),
}


@pytest.mark.parametrize("name", AXES)
def test_convolutions_of_any_axes_are_nodes_of_onnx(name):
    layer, shape = AXES[name]
    proto = held(layer, [shape])
    assert not proto.functions and name[:-2] in {n.op_type for n in proto.graph.node}


TOKENS, HEADS = (None, 5, 8), (None, 3, 5, 6)
OF_TOKENS = {
    "attention": (gl.MultiHeadAttention(8, 2, bias=False), TOKENS, {"Attention"}),
    "a causal one, groups": (
        gl.MultiHeadAttention(8, 4, 2, causal=True, dropout=0.3, scale=0.7),
        TOKENS,
        {"Attention"},
    ),
    "a cap": (gl.MultiHeadAttention(8, 2, causal=True, softcap=0.5), TOKENS, {"Attention"}),
    "a window": (gl.MultiHeadAttention(8, 4, 2, window=(2, -1)), TOKENS, {"MatMul", "Softmax"}),
    "window, cap": (gl.MultiHeadAttention(8, 2, 1, window=(2, 1), softcap=2.0, scale=0.7), TOKENS, {"Tanh", "Softmax"}),
    "rotary": (gl.RotaryEmbedding(4, 16), HEADS, {"Split", "Concat"}),
    "rotary, all of a head": (gl.RotaryEmbedding(6, 16, interleaved=True), HEADS, {"Split", "Reshape"}),
    "rotary, interleaved": (gl.RotaryEmbedding(2, 16, interleaved=True), HEADS, {"Split", "Reshape"}),
}


@pytest.mark.parametrize("name", OF_TOKENS)
def test_layers_of_tokens_are_nodes_of_onnx(name):
    layer, shape, nodes = OF_TOKENS[name]
    proto = held(layer, [shape])
    assert not proto.functions and nodes <= {n.op_type for n in proto.graph.node}


def test_attention_of_any_number_of_tokens():
    """Beside a local function, of the same opset; models without attention have an older one, which more runtimes load."""
    model = gl.Sequential(gl.MultiHeadAttention(8, 4, 2, causal=True), Swish())
    proto = held(model, [(None, 5, 8)])
    assert {o.version for f in (proto, *proto.functions) for o in f.opset_import if not o.domain} == {23}
    model, shapes = gl.Sequential(gl.MultiHeadAttention(8, 4, 2, causal=True), gl.GELU()), [(None, None, 8)]
    session = onnxruntime.InferenceSession(
        model_proto(model := moved(model, shapes), shapes).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for length in (3, 7):
        x = np.random.default_rng(length).standard_normal((2, length, 8)).astype(np.float32)
        np.testing.assert_allclose(session.run(None, {"input": x})[0], model.eval()(x), atol=TOLERANCE)
    assert model_proto(moved(Swish(), [ROW]), [ROW]).opset_import[0].version == 20


@pytest.mark.parametrize("node", NATIVE)
def test_layers_of_the_library_are_nodes_of_onnx(node):
    layer, shape = NATIVE[node]
    proto = held(layer, [shape])
    assert not proto.functions and node in {n.op_type for n in proto.graph.node}


RECORDED_INSTEAD = {
    "ceil_mode": (gl.MaxPool2d(2, 2, ceil_mode=True), IMAGE),
    "indices": (gl.MaxPool2d(2, return_indices=True), IMAGE),
    "uneven": (gl.AdaptiveAvgPool2d((3, 4)), IMAGE),
    "cut": (gl.ConstantPad2d((1, -1, 0, 2), 1.5), IMAGE),
    "rms": (gl.RMSNorm(7), IMAGE),
    "batch": (gl.BatchNorm2d(2, track_running_stats=False), IMAGE),
    "softplus": (gl.Softplus(2.0, 1.0), ROW),
}


@pytest.mark.parametrize("name", RECORDED_INSTEAD)
def test_what_no_node_computes_is_recorded(name):
    layer, shape = RECORDED_INSTEAD[name]
    assert [f.name for f in held(layer, [shape]).functions] == [type(layer).__name__]


@pytest.mark.parametrize("entry", gallery.ENTRIES, ids=lambda e: e.module)
def test_gallery(entry):
    """Whole models for images of digits."""
    with gallery.importable():
        model = entry.model()
        proto = held(model, [(None, 1, 8, 8)], by=0.01)
    assert {f.name.partition("_")[0] for f in proto.functions} == {entry.name}


@pytest.mark.parametrize("seed", range(0, 50, 10))
def test_random_stacks(seed):
    """Of the library's layers, ten at a time."""
    for stack in map(Stack, range(seed, seed + 10)):
        model, shape = stack.model(6)
        held(model, [(None, *shape)], by=0.1, zeros=True)


def test_in_onnxruntime_web(tmp_path):
    """A custom layer in what runs in a browser, too."""
    modules = node_modules("onnxruntime-web")
    model = moved(gl.Sequential(gl.Linear(6, 4), Swish(), Maxout(3)), [ROW])
    model.export(tmp_path / "model.onnx", format="onnx", input_shapes=[ROW])
    x = np.random.default_rng(0).standard_normal((5, 6)).astype(np.float32)
    (tmp_path / "run.cjs").write_text(
        "const ort = require('onnxruntime-web');\n"
        "ort.InferenceSession.create(require('fs').readFileSync(__dirname + '/model.onnx')).then(async (session) => {\n"
        f"  const x = new ort.Tensor('float32', {x.reshape(-1).tolist()}, {list(x.shape)});\n"
        "  console.log(JSON.stringify(Array.from((await session.run({input: x})).output.data)));\n"
        "});\n"
    )
    y = np.array(json.loads(node(linked(tmp_path, modules) / "run.cjs"))).reshape(5, 3)
    np.testing.assert_allclose(y, model.eval()(x), atol=TOLERANCE)


def test_models():
    """Branches, weights by their names, one function for equal layers and another where a constant differs."""
    swish, shared = Swish(), gl.Linear(6, 6)
    model = gl.Sequential(
        *(gl.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), gl.BatchNorm2d(3), Swish(), gl.MaxPool2d(2)),
        *(gl.Flatten(), gl.Linear(27, 6), gl.Residual(shared, gl.Residual(shared, swish, shortcut=Swish()))),
        gl.Parallel(Maxout(4), Maxout(4), gl.Sequential(Maxout(4, 3), gl.Dropout()), gl.Linear(6, 2), axis=-1),
        gl.Parallel(gl.Softmax(), gl.Tanh(), merge="sum"),
    )
    model.ensure_built(IMAGE)
    proto = held(model, [IMAGE])
    assert [f.name for f in proto.functions] == ["Swish", "Maxout", "Maxout_2"]
    assert {i.name for i in proto.graph.initializer} == model.named_weights().keys() - {"1.num_batches_tracked"}


def test_several_inputs_and_outputs():
    class Crossed(gl.Layer):
        def output_shape(self, a, b):
            return b, a, a

        def forward(self, a, b):
            return b, a, a

        def backward(self, db, da, again):
            return da + again, db

    shape = (None, 3)
    proto = held(gl.Sequential(GatedMerge(), Polar()), [shape, shape])
    assert [i.name for i in proto.graph.input] == ["input_1", "input_2"]
    assert [o.name for o in proto.graph.output] == ["output_1", "output_2"]
    held(Crossed(), [shape, (None, 2)])


def test_integers_come_in_where_a_layer_takes_them():
    proto = held(gl.Sequential(Lookup(), gl.Linear(3, 2)), [(None, 4)], integers=5)
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_export_writes_one_file(tmp_path):
    """Under any name, in place of one that is there, float16 weights as float32."""
    model = gl.Sequential(gl.Linear(4, 3), Swish()).to("float16")
    path = tmp_path / "ein Modell, größer.onnx"
    path.write_text("old")
    model.export(path, format="onnx", input_shapes=[(None, 4)])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = np.ones((2, 4), np.float16)
    (y,) = session.run(None, {"input": x.astype(np.float32)})
    np.testing.assert_allclose(y, model(x).astype(np.float32), atol=2e-3)
    lines = {n.doc_string for f in onnx.load(path).functions for n in f.node}
    assert "s = 1 / (1 + np.exp(-self.beta * x))" in lines
    with pytest.raises(IsADirectoryError, match="path of a file"):
        model.export(tmp_path, format="onnx", input_shapes=[(None, 4)])


def test_command(tmp_path, capsys):
    model = gl.Sequential(gl.Linear(4, 3), gl.Tanh())
    model.ensure_built((None, 4))
    gl.save(model, tmp_path / "saved")
    path = str(tmp_path / "model.onnx")
    assert cli.main(["export", str(tmp_path / "saved"), "--format", "onnx", "--out", path, "--input-shape", "1,4"]) == 0
    code = capsys.readouterr().out.splitlines()[-1].replace("{'input': x}", "{'input': np.ones((1, 4), np.float32)}")
    (y,) = eval(code, {"onnxruntime": onnxruntime, "np": np})
    np.testing.assert_allclose(y, model(np.ones((1, 4), np.float32)), atol=TOLERANCE)


def test_what_stands_in_the_way_is_listed_and_nothing_is_written(tmp_path, monkeypatch):
    class Branches(Swish):
        def forward(self, x):
            return x if x.max() > 0 else -x

    model = gl.Sequential(gl.Linear(4, 4), gl.Residual(Branches()), gl.Linear(4, 2), Branches())
    model[2].weight[0, 0] = np.nan
    with pytest.raises(ExportError) as error:
        model.export(tmp_path / "model.onnx", format="onnx", input_shapes=[(None, 4)])
    said = str(error.value)
    assert [r.place for r in error.value.refusals] == [
        "1.0",
        "2",
        "3",
    ] and "2.weight is not a number (NaN) at 1 of 8" in said
    assert said.count("test_onnx.py") == 2 and "`return x if x.max() > 0 else -x`" in said
    assert not list(tmp_path.iterdir())

    write = pathlib.Path.write_bytes

    def full(path, data):
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    (tmp_path / "earlier.onnx").write_text("it stays")
    for name in ("model.onnx", "earlier.onnx"):
        with pytest.raises(OSError, match="No space left"):
            gl.Sequential(gl.Linear(4, 4)).export(tmp_path / name, format="onnx", input_shapes=[(None, 4)])
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("earlier.onnx", "it stays")]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_a_table(mode):
    """With padding: bags of nothing but that are 0."""
    for padding in (None, 1):
        bags = gl.EmbeddingBag(3, 4, mode, padding)
        proto = held(bags, [(None, 2)], 3)
        assert not proto.functions
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    x = np.array([[1, 1], [1, 2]])
    (y,) = session.run(None, {proto.graph.input[0].name: x})
    assert not y[0].any() and np.allclose(y, moved(bags, [(None, 2)], 0.3)(x), atol=TOLERANCE)


def test_a_table_is_gathered_from_by_integers():
    layers = gl.Embedding(5, 3, padding_idx=1), gl.Flatten(), gl.Linear(12, 2)
    proto = held(gl.Sequential(*layers), [(None, 4)], 5)
    assert not proto.functions and "Gather" in {n.op_type for n in proto.graph.node}
    with pytest.raises(ExportError, match="indices: the rule is an integer dtype"):
        model_proto(gl.Sequential(gl.ReLU(), gl.Embedding(5, 3)), [(None, 4)])
