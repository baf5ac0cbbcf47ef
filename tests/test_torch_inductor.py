"""torch.compile: Inductor's code launches the kernels itself, and what it computes so is right; what stays one op, and why."""

import copy
import importlib
import pkgutil
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import torch.nn as nn  # noqa: E402
from gpulayers.bench.models.gpt import GPT  # noqa: E402
from gpulayers.bench.models.kind import NextToken, WithLoss  # noqa: E402
from gpulayers.bench.models.resnet import ResNet  # noqa: E402
from gpulayers.kernels import triton as triton_kernels  # noqa: E402
from gpulayers.kernels.triton import _configs, _tile, norm  # noqa: E402
from inductors_launches import LITE, launched, ttir  # noqa: E402
from torch._dynamo.backends.common import aot_autograd  # noqa: E402
from torch._higher_order_ops import triton_kernel_wrap  # noqa: E402
from torch._inductor.utils import run_fw_bw_and_get_code  # noqa: E402
from triton.compiler import CompilationError  # noqa: E402
from triton.language import constexpr  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import gpulayers as gl  # noqa: E402
import gpulayers.torch as gt  # noqa: E402
from gpulayers import dispatch, launch  # noqa: E402
from gpulayers.testing.null_driver import null_driver  # noqa: E402
from gpulayers.testing.torch_cases import Everything, loss  # noqa: E402
from gpulayers.torch import _inductor  # noqa: E402

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled", "ignore:.*boxed arguments"),
]
same = torch.testing.assert_close


def launches(code):
    """The kernels that generated code launches, in turn."""
    return [re.sub(r"_\d+$", "", name) for name in re.findall(r"(\w+)\.run\(", code)]


def wide(text):
    """The lines of TTIR, below a kernel's head, that have float64 in them; files' names may have the letters."""
    return [line for line in text.splitlines() if re.search(r"f64\b", line) and "tt.func" not in line]


def compiled(model, *inputs):
    """(outputs, the code of forward and backward, the kernels that ran). Each is also read by Triton's compiler, with the types
    that stand in the code: it computes nothing in float64."""
    with launched() as (session, kernels):
        step = torch.compile(model, fullgraph=True, options=LITE)
        outputs, codes = run_fw_bw_and_get_code(lambda: step(*inputs))
        texts = [ttir(k.function, k.meta["signature"], k.constants, k.meta["configs"][0]) for k in kernels]
    assert all("arith.truncf" in line for text in texts for line in wide(text))
    return outputs, codes, [each.kernel for each in session.launches]


MODELS = {
    "GPT": (
        lambda: WithLoss(GPT(24, 16, 2, 1, 8, 0.0), NextToken()),
        lambda: (*torch.randint(24, (2, 2, 8)),),
        "_embedding_forward_kernel _norm_forward_kernel _matmul_kernel _cross_entropy_forward_kernel _reduce_kernel "
        "_keys_kernel _digits_kernel _totals_kernel _placed_kernel",
        "_norm_backward_kernel _norm_finalise_kernel _matmul_kernel _linear_backward_columns_kernel _finish_kernel "
        "_cross_entropy_backward_kernel _bounds_kernel _embedding_rows_kernel",
    ),
    "ResNet": (
        lambda: WithLoss(ResNet((1,), 4, 5), nn.CrossEntropyLoss()),
        lambda: (torch.randn(2, 3, 8, 8), torch.randint(5, (2,))),
        "_nhwc_kernel _conv_kernel _batch_norm_moments_kernel _batch_norm_forward_kernel _max_pool_runs_forward_kernel "
        "_mean_of_few_kernel _matmul_kernel _cross_entropy_forward_kernel _reduce_kernel",
        "_nhwc_kernel _conv_kernel _conv_weight_kernel _batch_norm_sums_kernel _batch_norm_backward_kernel "
        "_max_pool_runs_backward_kernel _mean_to_planes_kernel _matmul_kernel "
        "_linear_backward_columns_kernel _finish_kernel _cross_entropy_backward_kernel",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_patched_models(name):
    """Their code launches our kernels and calls no op of ours; sums and activations are in epilogues. Loss, gradients and
    statistics are torch's own."""
    make, batch, *kernels = MODELS[name]
    theirs, inputs = make(), batch()
    ours = copy.deepcopy(theirs)
    gt.patch(ours, fuse=True)
    total, codes, ran = compiled(ours, *inputs)
    expected = theirs(*inputs)
    expected.backward()
    same(total, expected)
    for (which, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        same(p.grad, q.grad, msg=lambda text, which=which: f"{which}: {text}")
    same(list(ours.buffers()), list(theirs.buffers()))
    for code, wanted in zip(codes, kernels, strict=True):
        assert "torch.ops.gpulayers" not in code and "clone_default" not in code
        assert set(launches(code)) == set(wanted.split())
    assert sorted(ran) == sorted(launches("".join(codes)))


def test_tensor_descriptors():
    """The matrix product of 16-bit numbers: the code makes the descriptors that its kernel loads through."""
    ours, x = gt.Linear(64, 96).bfloat16(), torch.randn(64, 64, dtype=torch.bfloat16)
    theirs, (a, b) = copy.deepcopy(ours), (x.clone().requires_grad_() for _ in range(2))
    theirs.__class__ = nn.Linear
    y, codes, _ = compiled(ours, a)
    theirs(b).sum().backward()
    same([y, a.grad, ours.weight.grad, ours.bias.grad], [theirs(b), b.grad, theirs.weight.grad, theirs.bias.grad])
    assert [launches(code).count("_matmul_tma_kernel") for code in codes] == [1, 2]
    assert [code.count("TensorDescriptor.from_tensor(") for code in codes] == [3, 5]  # dy is both products'


def test_attentions_descriptors():
    """Boxes of four axes; y is written through one."""
    given = [torch.randn(1, 2, 32, 16, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    single = [x.detach().float().requires_grad_() for x in given]
    y, codes, ran = compiled(
        lambda q, k, v: gt.functional.scaled_dot_product_attention(q, k, v, is_causal=True), *given
    )
    true = nn.functional.scaled_dot_product_attention(*single, is_causal=True)
    true.sum().backward()
    for mine, its in zip((y, *(x.grad for x in given)), (true, *(x.grad for x in single))):
        same(mine.float(), its, rtol=2e-2, atol=2e-2)
    assert [code.count("TensorDescriptor.from_tensor(") for code in codes] == [4, 10]
    assert ran == [f"_attention_{name}_kernel" for name in ("forward", "delta", "keys", "queries")]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(n, 64).bfloat16() / 8 for n in (96, 64))

    def forward(self, x):
        return torch.cat(gt.functional.linears(x, [*self.weights]), -1)


def test_several_products():
    """Each writes into an array of its own, and none is written twice."""
    heads, x = Heads(), torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    y, codes, _ = compiled(heads, x)
    assert [launches(code) for code in codes] == [["_linears_kernel"], ["_linears_kernel"] * 2]
    found = [y, x.grad, *(w.grad for w in heads.weights)]
    inputs = [t.detach().double().requires_grad_() for t in (x, *heads.weights)]
    right = torch.cat([inputs[0] @ w.T for w in inputs[1:]], -1)
    wanted = [right, *torch.autograd.grad(right.sum(), inputs)]
    for one, other in zip(found, wanted, strict=True):
        same(one.double(), other, rtol=2**-7, atol=2**-7)


# --- every class ------------------------------------------------------------------------------------------------------


def traced(function, *calls, dynamic=False):
    """(what ``calls`` of a compiled function give, our ops and kernels in its graphs)"""
    found = []

    def noted(graph, _):
        found.extend(str(n.target) for n in graph.graph.nodes if n.op == "call_function")
        return graph

    backend = aot_autograd(fw_compiler=noted, bw_compiler=noted)
    step = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    given = [call(step) for call in calls]
    return given, [t for t in found if t.startswith("gpulayers") or t.startswith("triton_kernel_wrapper")]


@pytest.mark.parametrize("norm, weights", [("layer_norm", 2), ("rms_norm", 1)])
def test_norms_of_a_sum(norm, weights):
    """One gradient for both summands, from kernels in the graph, though autograd adds to what each of them got."""
    leaves = [torch.randn(6, 32).requires_grad_() for _ in range(2)]
    leaves += [torch.randn(32).requires_grad_() for _ in range(weights)]

    def step(x, residual, *weights):
        y, total = getattr(gt.functional, f"add_{norm}")(x * 1.5, residual, (32,), *weights)
        return (y * y + total.sin() + 3 * residual).sum()

    def plain(x, residual, *weights):
        total = x * 1.5 + residual
        y = getattr(nn.functional, norm)(total, (32,), *weights)
        return (y * y + total.sin() + 3 * residual).sum()

    with launched(), launch.off():
        (found,), targets = traced(step, lambda call: torch.autograd.grad(call(*leaves), leaves))
    same(found, torch.autograd.grad(plain(*leaves), leaves))
    assert len(targets) >= 3 and set(targets) == {"triton_kernel_wrapper_functional"}


def test_volumes():
    """Their kernels ask for a limit of registers, which Inductor knows no name for."""
    x, pool = torch.randn(1, 2, 4, 4, 4).requires_grad_(), gt.MaxPool3d(2)
    with launched(), launch.off():
        (found,), targets = traced(lambda x: pool(x).sin().sum(), lambda call: torch.autograd.grad(call(x), x))
    same(found, torch.autograd.grad(nn.functional.max_pool3d(x, 2).sin().sum(), x))
    assert set(targets) == {"triton_kernel_wrapper_functional"}


def test_every_class():
    """One graph of all: no op of ours but two is left in it, forward and backward; it computes what eager launches compute."""
    model = Everything(gt)

    def trained(call):
        torch.manual_seed(7)
        x = torch.randn(5, 3, 12, 11).requires_grad_()
        model.zero_grad()
        total, outputs = call(model, x, torch.arange(5))
        total.backward()
        return total, outputs, x.grad, [p.grad for p in model.parameters()], [b.clone() for b in model.buffers()]

    before = copy.deepcopy(model.state_dict())
    with launched(), launch.off():
        (found,), targets = traced(loss, trained)
        model.load_state_dict(before)
        same(found, trained(loss), rtol=0, atol=0)
    tables = {"gpulayers.interpolate.default", "gpulayers.interpolate_backward.default"}  # are made outside of a graph
    writes = {
        "gpulayers.max_unpool.default"
    }  # at places that it reads, which torch takes for writes to the places' array
    assert len(targets) > 100 and set(targets) == {"triton_kernel_wrapper_functional"} | tables | writes


def test_torchs_kernels_on_the_cpu():
    """Ops that torch's own kernels compute there are in the graph as these, forward and backward."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 6)
    theirs = nn.Sequential(*layers, nn.GELU(), nn.LayerNorm(6))
    ours = copy.deepcopy(theirs)
    gt.patch(ours)
    batch = torch.randn(2, 3, 8, 8)

    def trained(model):
        x = batch.clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        return y, x.grad

    (found,), targets = traced(ours, trained)
    same(found, trained(theirs))
    same([p.grad for p in ours.parameters()], [p.grad for p in theirs.parameters()], rtol=1e-4, atol=1e-5)
    same(list(ours.buffers()), list(theirs.buffers()))
    assert targets == []


# --- what stays one op ------------------------------------------------------------------------------------------------


def left(x=None, module=None):
    """The ops that are left in the graph of a forward."""
    x, module = torch.randn(64, 64) if x is None else x, module or gt.ReLU()
    with launched(), launch.off(), torch.no_grad():
        return {t for t in traced(module, lambda call: call(x))[1] if t.startswith("gpulayers")}


def test_opaque_backends():
    """What neither Triton nor torch's own kernels compute; on the CPU those are in the graph."""
    assert left() == set()
    with launched(), dispatch.policy(backends=("triton", "definition")), torch.no_grad():
        x = torch.randn(4, dtype=torch.float64)
        assert traced(gt.ReLU(), lambda call: call(x))[1] == ["gpulayers.relu.default"]
    torch.compiler.reset()
    with torch.no_grad():
        assert traced(gt.SiLU(), lambda call: call(torch.randn(4)))[1] == ["gpulayers.silu.default"]
        assert traced(gt.Dropout(), lambda call: call(torch.randn(4)))[1] == ["gpulayers.dropout.default"]


def test_opaque_descriptors(monkeypatch):
    linear, x = gt.Linear(64, 64).bfloat16(), torch.randn(64, 64, dtype=torch.bfloat16)
    assert left(x, linear) == set()
    monkeypatch.delattr(triton_kernel_wrap, "create_tma_stable_metadata")
    assert left(x, linear) == {"gpulayers.linear.default"}


@pytest.mark.parametrize("seen", [[], ["x", "y"]])
def test_opaque_where_torch_misreads_writes(seen, monkeypatch):
    monkeypatch.setattr(triton_kernel_wrap, "get_mutated_tensors", lambda *args: seen)
    assert left() == {"gpulayers.relu.default"}


def test_opaque_arguments():
    with _inductor._compiling():
        with pytest.raises(_inductor.Opaque, match=_inductor.OPAQUE["tuple"]):
            _tile.launch(_tile._copy_kernel, (1,), 1, 2, (3, 4))
        with pytest.raises(_inductor.Opaque, match=_inductor.OPAQUE["table"]):
            _tile.launch_on_table([], _tile._copy_kernel, (1,))
    above = {"backend", "values", "descriptor", "writes", "tuple", "table"}
    assert set(_inductor.OPAQUE) == {*above, "loop"}  # test_torch_recurrent.py


def test_exported_whole():
    with launched():
        exported = torch.export.export(gt.ReLU(), (torch.randn(4, 8),))
    assert "gpulayers.relu.default" in {str(n.target) for n in exported.graph.nodes}


# --- kernels as text --------------------------------------------------------------------------------------------------


def kernels():
    names = [m.name for m in pkgutil.iter_modules(triton_kernels.__path__, f"{triton_kernels.__name__}.")]
    found = {k for name in names for k in vars(importlib.import_module(name)).values() if isinstance(k, JITFunction)}
    return sorted(found, key=lambda k: k.__name__)


@pytest.mark.parametrize("kernel", kernels(), ids=lambda k: k.__name__)
def test_kernels_names(kernel):
    """Inductor writes a kernel into its code with the functions and numbers that it names, and no modules but two that it imports itself."""
    for name in kernel.fn.__code__.co_names:
        value = kernel.fn.__globals__.get(name)
        known = value is None or name in ("tl", "libdevice") or isinstance(value, int | str | constexpr)
        assert known or (isinstance(value, JITFunction) and value.__name__ == name), f"{name} is {value!r}"
        if isinstance(value, constexpr):
            assert eval(repr(value.value), {}) == value.value


def test_numbers_are_single():
    """Inductor hands numbers over in float64, which is cast before anything is computed."""
    kernel = norm._norm_forward_kernel
    signature = dict.fromkeys(("x", "weight", "bias", "y", "mean", "rstd"), "*fp32")
    signature |= {"M": "i32", "N": "i32", "x_row": "i32", "eps": "fp64"}
    constants = dict.fromkeys(n for n in kernel.arg_names if n not in signature)
    constants |= {"UNIT": 1, "RMS": False, "ROWS": 1, "BLOCK": 64, "PIECES": 1, "WHOLE": False}
    kinds = {n: signature.get(n, "constexpr") for n in kernel.arg_names}
    with null_driver(compiled=False):
        with pytest.raises(CompilationError, match="got fp64"):
            ttir(kernel, kinds, constants)
        text = ttir(_inductor._in_single(kernel, ("eps",)), kinds, constants)
    (line,) = wide(text)
    assert "arith.truncf" in line


def test_what_is_kept_on_disk():
    """Torch finds compiled code again by this: another one where launches are made otherwise."""
    seen = [_inductor._STATE.src]
    for context in (gl.only("triton"), gl.sms(reserve=4), _configs.forced("norm_forward", _configs.Row(None, 1024, 4))):
        with context:
            seen.append(_inductor._STATE.src)
    assert len(set(seen)) == 4 and seen[0] == _inductor._STATE.src
    assert torch._library.triton.get_triton_kernels_for_op("gpulayers::relu_backward") == [_inductor._STATE]
