"""Autocast and mixed dtypes: the dtypes that torch.nn gives, layer by layer, eager and compiled."""

import itertools

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers.testing import torch_cases  # noqa: E402
from gpulayers.testing.torch_cases import CASES, Everything  # noqa: E402
from gpulayers.torch import (  # noqa: E402
    _autocast,
    activation,
    conv,
    dropout,
    linear,
    loss,
    norm,
    padding,
    pooling,
    softmax,
)
from gpulayers.torch._op import TorchOp  # noqa: E402

HALVES = (torch.bfloat16, torch.float16)
FAMILIES = (activation, conv, linear, loss, norm, padding, pooling, softmax, dropout)


def dtypes(module, inputs):
    """Of the outputs, of the inputs' gradients and of the parameters'; or the type of the error."""
    x = inputs[0].detach().requires_grad_()
    try:
        found = module(x, *inputs[1:])
        outputs = found if isinstance(found, tuple) else (found,)
        outputs[0].sum().backward()
    except Exception as error:
        return type(error)
    return [y.dtype for y in outputs], x.grad.dtype, [p.grad.dtype for p in module.parameters()]


def compare(case, of_module, of_input):
    if case.name == "RReLU" and of_input is torch.float16:
        return  # torch has none on the CPU
    if case.name == "LocalResponseNorm" and of_input in HALVES and not torch.is_autocast_enabled("cpu"):
        return  # nor does it pool images of 16 bits there
    if case.name in ("AvgPool3d", "LPPool3d") and of_input in HALVES and not torch.is_autocast_enabled("cpu"):
        return  # nor volumes
    ours, theirs = (dtypes(case.module(m, of_module), case.inputs(of_input)) for m in (gt, nn))
    if isinstance(theirs, type):
        assert isinstance(ours, type) and issubclass(ours, theirs), (of_module, of_input, ours, theirs)
    else:
        assert ours == theirs, (of_module, of_input)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layer(case):
    for lower, of_input in itertools.product(HALVES, (torch.float32, *HALVES, torch.float64)):
        of_module = torch.float64 if of_input is torch.float64 else torch.float32
        with torch.autocast("cpu", lower):
            compare(case, of_module, of_input)


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in ("MultiMarginLoss", "MultiLabelMarginLoss", "CTCLoss")], ids=str
)  # torch's: no 16 bits on a CPU
def test_mixed_dtypes_without_autocast(case):
    for of_module, of_input in itertools.permutations((torch.float32, torch.float64, *HALVES), 2):
        compare(case, of_module, of_input)


def named_dtypes(model, call, lower):
    """Of every output and every gradient."""
    x, labels = torch.randn(5, 3, 12, 11, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    with torch.autocast("cpu", lower):
        total, found = call(model, x.requires_grad_(), labels)
    total.backward()
    return (
        {name: y.dtype for name, y in found.items()},
        {name: p.grad.dtype for name, p in model.named_parameters()},
        x.grad.dtype,
    )


@pytest.mark.parametrize("lower", HALVES, ids=str)
def test_one_model_of_all(lower):
    """Eager; and compiled with the type that is not the CPU's own choice, which none that looks away would give."""
    theirs = Everything(nn)
    theirs.layers["RReLU"] = nn.LeakyReLU()  # torch has no RReLU for float16 on the CPU
    truth = named_dtypes(theirs, torch_cases.loss, lower)
    assert len(set(truth[0].values())) == 2
    ours = Everything(gt)
    assert named_dtypes(ours, torch_cases.loss, lower) == truth
    if lower is not torch.get_autocast_dtype("cpu"):
        torch.compiler.reset()
        compiled = torch.compile(torch_cases.loss, backend="aot_eager", fullgraph=True)
        assert named_dtypes(ours, compiled, lower) == truth


def test_the_compiled_function_may_turn_it_on_and_off():
    def call(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            a = m(x)
            with torch.autocast("cpu", enabled=False):
                b = m(x)
        return a, b, m(x)

    m, x = gt.Linear(3, 4), torch.randn(2, 3)
    torch.compiler.reset()
    found = [call(m, x), torch.compile(call, backend="aot_eager", fullgraph=True)(m, x)]
    for ys in found:
        assert [y.dtype for y in ys] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(*found, rtol=0, atol=0)


# --- CUDA's rules, without CUDA ---------------------------------------------------------------------------------------

RULES = {o.name: o.cast for family in FAMILIES for o in vars(family).values() if isinstance(o, TorchOp)}
ON_CUDA = {
    "float32": (
        "layer_norm",
        "rms_norm",
        "add_layer_norm",
        "add_rms_norm",
        "group_norm",
        "local_response_norm",
        "softmax",
        "log_softmax",
        "softmin",
        "softplus",
        "cross_entropy",
        "nll_loss",
        "mse",
        "pairwise_distance",
        "cosine_similarity",
        "normalize",
        "pdist",
        "pointwise_loss",
        "row_loss",
        "multilabel_margin",
    ),
    "lower": ("linear", "linears", "matmul", "conv", "conv_batch_norm", "conv_transpose", "prelu", "recurrent"),
}
"""What torch documents, and what RMSNorm and Softmin, which it does not name, do."""


def test_rules_for_cuda():
    found = {name: rule.get("cuda") if isinstance(rule, dict) else rule for name, rule in RULES.items()}
    named = {name: rule for rule, names in ON_CUDA.items() for name in names}
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::rms_norm", "AutocastCUDA"):  # torch 2.11
        del named["rms_norm"], named["add_rms_norm"]
    assert found == {name: named.get(name) for name in RULES}


class _Autocast:
    """An autocast of CUDA that needs no CUDA."""

    def __enter__(self):
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        torch.set_autocast_cache_enabled(False)

    def __exit__(self, *error):
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
        torch.set_autocast_cache_enabled(True)


def test_rules_for_cuda_cast_fake_tensors():
    with FakeTensorMode(), _Autocast():
        x = torch.empty(3, 4, device="cuda")
        wide, labels = x.double(), torch.zeros(3, dtype=torch.int64, device="cuda")
        cast = _autocast.cast
        assert [t.dtype for t in cast(_autocast.LOWER, (x, x, None), 3)[:2]] == [torch.bfloat16] * 2
        assert cast(_autocast.LOWER, (x, None, 2.0), 2)[1:] == (None, 2.0)
        assert [t.dtype for t in cast(_autocast.LOWER, (x, wide, labels), 3)] == [
            torch.bfloat16,
            wide.dtype,
            labels.dtype,
        ]
        assert cast(_autocast.LOWER, (x, x.cpu()), 2)[1].dtype is torch.float32
        for rule in (_autocast.LOSS, _autocast.ON_CUDA):
            assert cast(rule, (x.bfloat16(), labels), 2)[0].dtype is torch.float32
        assert cast(None, (x.half(),), 1)[0].dtype is torch.float16
        assert cast(_autocast.ON_CUDA, (x.cpu().half(),), 1)[0].dtype is torch.float16
    assert not torch.is_autocast_enabled("cuda")


ASK_A_GPU = ("RReLU", "Unfold", "CTCLoss", "GaussianNLLLoss", "BCELoss")
"""Torch's own want a GPU's generator, an array of places on it, cuDNN, and its variances; autocast forbids the last."""


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in ASK_A_GPU], ids=str)
def test_layer_for_cuda(case):
    """Both of them on fake CUDA tensors; forward alone: the engine of autograd wants the GPU."""

    def outputs(library, of_input):
        module = case.module(library).train(
            "BatchNorm" not in case.name and "InstanceNorm2" not in case.name
        )  # it would copy statistics
        with FakeTensorMode(), _Autocast(), torch.no_grad():
            for values in [v for m in module.modules() for v in (m._parameters, m._buffers)]:
                for name, t in list(values.items()):
                    values[name] = t if t is None else torch.empty(t.shape, dtype=t.dtype, device="cuda")
            found = module(*[torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in case.inputs(of_input)])
            return [y.dtype for y in (found if isinstance(found, tuple) else (found,))]

    for of_input in (torch.float32, *HALVES):
        if case.name == "Bilinear" and of_input is torch.float16:  # other 16 bits than autocast's
            for library in (gt, nn):
                with pytest.raises(RuntimeError, match="Unexpected floating ScalarType"):
                    outputs(library, of_input)
        else:
            assert outputs(gt, of_input) == outputs(nn, of_input)
