"""Wrapped layers that leave with their module by torch.export and torch.onnx.export: array code as torch's operations."""

import numpy as np
import pytest
import torch
from recorded.array_layers import CASES, DTYPES, Same
from recorded.expressions import RECORDED, SHAPE, Computes

import gpulayers as gl
from gpulayers.export.recording import Unrecordable
from gpulayers.torch import _exported, wrap

BATCH = {0: torch.export.Dim("n", min=2)}


def inputs(shapes, dtypes, batch) -> list[torch.Tensor]:
    rng = np.random.default_rng(batch)
    kinds = [np.dtype(d) for d in dtypes] + [np.dtype(np.float32)] * (len(shapes) - len(dtypes))
    drawn = [rng.standard_normal([batch if n is None else n for n in shape]) for shape in shapes]
    return [torch.from_numpy(x.astype(k) if k.kind == "f" else (x > 0).astype(k)) for x, k in zip(drawn, kinds)]


def same(got, want):
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True, check_dtype=False)


def held(layer, shapes, dtypes=()):
    """The operations of torch against the layer itself, in both modes; what a layer updates, too."""
    for training in (True, False):
        module = wrap(layer, *shapes).train(training)
        xs = inputs(shapes, dtypes, 6)
        state = {name: t.clone() for name, t in module.state_dict().items()}
        with torch.no_grad():
            got = _exported.run(layer, training, xs, tensors := {name: t.clone() for name, t in state.items()})
            want = module(*xs)
        same(got, want)
        same(list(tensors.values()), list(module.state_dict().values()))
        module.load_state_dict(state)


@pytest.mark.parametrize("name", CASES)
def test_array_layers(name):
    layer, shapes = CASES[name]
    held(layer, shapes, DTYPES.get(name, ()))


@pytest.mark.parametrize("name", RECORDED)
def test_functions_of_numpy(name):
    held(Computes(RECORDED[name]), [SHAPE])


def exported(module, *xs, **options):
    return torch.export.export(module, xs, dynamic_shapes=((BATCH,) * len(xs),), **options)


BUILT_IN = {
    "BatchNorm1d": (gl.BatchNorm1d(5), [(None, 5)]),
    "Conv2d": (gl.Conv2d(2, 3, 3, padding=1), [(None, 2, 4, 5)]),
    "Sequential": (gl.Sequential(gl.Linear(5, 4), gl.Parallel(gl.Tanh(), gl.Softmax())), [(None, 5)]),
}


@pytest.mark.parametrize("name", ["Swish", "SqueezeExcite", "GatedMerge", "BatchCenter", "CumulativeMean", *BUILT_IN])
def test_torch_export_for_any_batch(name):
    layer, shapes = (CASES | BUILT_IN)[name]
    module = wrap(layer, *shapes).eval()
    program = exported(module, *inputs(shapes, (), 4)).module()
    for batch in (2, 9):
        same(program(*inputs(shapes, (), batch)), module(*inputs(shapes, (), batch)))


def test_states_are_written_into_buffers():
    module = wrap(gl.BatchNorm1d(5), (None, 5)).train()
    (x,) = inputs([(None, 5)], (), 7)
    program = exported(module, x).module()
    same(program(x), module(x))
    same([t for _, t in sorted(program.named_buffers())], [t for _, t in sorted(module.named_buffers())])


def test_gradients_are_torchs():
    layer, theirs = gl.Linear(5, 3), torch.nn.Linear(5, 3)
    layer.load_state_dict(theirs.state_dict())
    (x,) = inputs([(None, 5)], (), 4)
    program = exported(wrap(layer, (None, 5)), x).module()
    program(x).square().sum().backward()
    theirs(x).square().sum().backward()
    same(
        [p.grad for _, p in sorted(program.named_parameters())], [p.grad for _, p in sorted(theirs.named_parameters())]
    )


def test_what_cannot_leave_says_why():
    class Branches(Same):
        def forward(self, x):
            return x if x.max() > 0 else -x

        def backward(self, dy):
            return dy

    (x,) = inputs([(None, 5)], (), 4)
    with pytest.raises(Unrecordable, match=r"test_torch_export\.py.*return x if x\.max\(\) > 0 else -x"):
        exported(wrap(Branches(), (None, 5)), x)
    with pytest.raises(Exception, match="export it with strict=False"):
        exported(wrap(gl.ReLU(), (None, 5)), x, strict=True)
    with pytest.raises(
        ValueError, match="ReLU: exported: input 0: the rule is sizes that are known, but for the batch's"
    ):
        torch.export.export(wrap(gl.ReLU()), (x,), dynamic_shapes=(({1: torch.export.Dim("m", min=2)},),))


def test_torch_onnx_export(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript", reason="torch.onnx.export(dynamo=True) needs onnxscript")
    layer, shape = CASES["Swish"]
    model = torch.nn.Sequential(torch.nn.Identity(), wrap(layer, *shape)).eval()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, tuple(inputs(shape, (), 4)), path, dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
    session = runtime.InferenceSession(path)
    for batch in (2, 9):
        (x,) = inputs(shape, (), batch)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)
