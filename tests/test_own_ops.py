"""``gl.op``: an op of one's own is dispatched, explained, checked and measured as the library's are."""

import sys
import types

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import cli
from gpulayers.arrays import Spec, bfloat16, float32
from gpulayers.testing import CheckError, audit_op, check_layer, check_op

RANDOM = np.random.default_rng(0).standard_normal


def scaled(x, w=None, *, power=2):
    """y = w |x|ᵖ, and Σ |x|ᵖ of each row."""
    size = np.abs(x) ** power
    return size if w is None else w * size, size.sum(-1), np.sign(x) * size


def scaled_backward(dy, dsums, x, w, signed, *, power):
    slope = power * signed / np.where(x == 0, 1, np.abs(x))
    return (dy if w is None else w * dy) * slope + dsums[..., None] * slope, (
        None if w is None else (dy * np.abs(x) ** power).sum(tuple(range(dy.ndim - 1)))
    )


scaled_op = gl.op(
    "scaled",
    scaled,
    scaled_backward,
    shape=lambda x, w, power: {"sums": x[:-1]},
    outputs=("y", "sums"),
)


def test_outputs_options_what_is_kept_and_what_may_be_missing():
    x, w = RANDOM((2, 3, 4)), RANDOM(4)
    assert check_op(scaled_op, x, w, numeric=True, power=3) == ["definition"]
    assert check_op(scaled_op, x, power=1.5) == ["definition"]
    y, call = scaled_op.record(x.astype("f"), w.astype("f"), needs=["x"])
    assert call.saved.keys() == {"x", "w", "signed"} and call.saved["signed"].dtype == float32
    dx, dw = call.backward(None, y[1])
    assert dx.shape == x.shape and dw is None
    assert (
        scaled_op.name == "scaled" and scaled_op.__doc__.startswith("y = w |x|") and scaled_op.options == {"power": 2}
    )


def test_16_bits_are_computed_in_32():
    seen = []

    def forward(x):
        seen.append(x.dtype)
        return x.sum(-1)

    op = gl.op("total", forward, lambda dy, x: dy[..., None] + 0 * x, shape=lambda x: x[:-1])
    y = op(np.ones((2, 3000), np.float16))  # in float16 a sum of ones ends at 2048
    assert y.dtype == np.float16 and (y == 3000).all() and seen == [float32]
    assert op(np.ones((2, 3), bfloat16)).dtype == bfloat16
    with pytest.raises(NotImplementedError, match=r"total: x: the rule is dtype ∈ .*; got int64"):
        op(np.arange(6).reshape(2, 3))


def test_an_output_that_is_an_index():
    op = gl.op(
        "first",
        lambda x: (x[..., 0], x.argmax(-1)),
        lambda dy, _, x: np.concatenate([dy[..., None], np.zeros_like(x[..., 1:])], -1),
        outputs=("y", "best"),
        shape=lambda x: {"y": x[:-1], "best": Spec(x[:-1], np.dtype("int64"))},
    )
    assert check_op(op, RANDOM((3, 4)), numeric=True) == ["definition"]


def one(x):
    return x


WRONG = [
    (("two words", one, lambda dy: dy), "op: name: the rule is an identifier, as signed_square; got 'two words'"),
    (("f", one, lambda: None), r"f: the rule is backward\(dy, …\), a gradient for each output first; got backward\(\)"),
    (("f", lambda x, *, p: x, lambda dy: dy), r"f: backward: the rule is \(dy, p\); got \(dy\)"),
    (("f", one, lambda dy, *, p: dy), r"f: backward: the rule is \(dy\); got \(dy, p\)"),
]


@pytest.mark.parametrize("args, text", WRONG, ids=lambda v: v if isinstance(v, str) else "")
def test_functions_that_do_not_fit(args, text):
    with pytest.raises((TypeError, ValueError), match=text):
        gl.op(*args)


def test_launchers_that_do_not_fit():
    with pytest.raises(TypeError, match=r"f: triton's backward: the rule is \(dy, x\); got \(dy, y\)"):
        gl.op("f", one, lambda dy, x: dy, triton=(lambda x, *, empty: x, lambda dy, y, *, empty: dy))


def test_values_that_do_not_fit():
    op = gl.op("f", one, lambda dy, x, extra: dy)
    with pytest.raises(TypeError, match="f: the rule is forward gives y, extra, as backward asks for; got 1 values"):
        op(np.ones(3))
    op = gl.op("f", one, lambda dy: (dy, dy))
    with pytest.raises(
        TypeError, match="f: the rule is backward gives a gradient, or None, for each of x; got 2 values"
    ):
        op.record(np.ones(3))[1].backward(np.ones(3))
    op = gl.op("f", one, lambda dy: None)
    with pytest.raises(
        TypeError, match="f: backward: the rule is a gradient of x, unless differentiable=… leaves it out"
    ):
        op.record(np.ones(3))[1].backward(np.ones(3))


# --- with kernels ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def doubling():
    """An op with a Triton kernel, made of launchers that may be given."""
    triton = pytest.importorskip("triton")
    from own_kernels import double_kernel, double_too_far_kernel

    def launcher(kernel):
        def launch(x, *, empty):
            y = empty(x.shape, x.dtype)
            kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
            return y

        return launch

    def make(forward=None, backward=None):
        right = launcher(double_kernel)
        pair = (forward or right, backward or (lambda dy, *, empty: right(dy, empty=empty)))
        return gl.op("doubled", lambda x: 2 * x, lambda dy: 2 * dy, triton=pair)

    return types.SimpleNamespace(make=make, launcher=launcher, too_far=double_too_far_kernel)


def test_kernels_are_dispatched_and_explained(doubling):
    from gpulayers.testing.arena import arena
    from gpulayers.testing.interpreter import interpreting

    op, x = doubling.make(), RANDOM((3, 5)).astype("f")
    backend, reasons = gl.explain(op, x)
    assert backend == "definition" and reasons["triton"] == "its kernels take CUDA arrays"
    with interpreting() as session, arena("triton"):
        y, call = op.record(x.T)
        assert np.array_equal(y, 2 * x.T) and np.array_equal(call.backward(y)[0], 4 * x.T)
    assert [run.kernel for run in session.launches if run.kernel != "_copy_kernel"] == ["double_kernel"] * 2
    with pytest.raises(gl.Refused, match="triton: its kernels take CUDA arrays"), gl.only("triton"):
        op(x)


def test_kernels_are_checked(doubling):
    """In every memory order, and without elements, where none runs."""
    assert check_op(doubling.make(), RANDOM((3, 5)), dtypes=["float32", "bfloat16"]) == ["definition", "triton"]
    assert "triton" in check_op(doubling.make(), np.ones((0, 3)), dtypes=["float32"])


def test_a_kernel_that_leaves_its_arrays_is_found(doubling):
    from gpulayers.testing.interpreter import interpreting

    op = doubling.make(doubling.launcher(doubling.too_far))
    with interpreting(), pytest.raises(Exception, match=r"(?s)double_too_far_kernel.*out of bounds"):
        check_op(op, RANDOM((3, 5)), dtypes=["float32"], backends=["triton"])


def test_a_wrong_kernel_is_found_in_the_layer_that_runs_it(doubling):
    """In a layer of array code, too, that runs the op."""
    op = doubling.make(backward=lambda dy, *, empty: empty(dy.shape, dy.dtype).fill_(2))

    class Runs(gl.Layer):
        def output_shape(self, shape):
            return shape

        def forward(self, x):
            return self.run(op, x) / 2

        def backward(self, dy):
            return self.run_backward(dy / 2)

    gl.register(Runs, name="own_ops.Runs")
    assert check_layer(Runs(), (None, 3), dtypes=(), backends=())
    with pytest.raises(CheckError, match=r"Runs: kernels: in float32 \(triton\) dx is wrong"):
        check_layer(Runs(), (None, 3), dtypes=())


def test_machine_code_is_audited(doubling):
    (report,) = audit_op(doubling.make(), Spec((256, 256), float32), archs=[90])
    assert report.kernel == "double_kernel" and report.loads and not report.spills


ATOMIC = """
extern "C" __global__ void add_float32(const float* x, float* y, long long n) {
    if (threadIdx.x < n) atomicAdd(y, x[threadIdx.x]);
}
"""


def test_machine_code_of_cuda_is_audited():
    pytest.importorskip("cupy_backends")
    from gpulayers.kernels.cuda import Source

    source = Source(ATOMIC)

    def launch(x, *, empty):
        y = empty((), x.dtype)
        source.launch(f"add_{x.dtype}", (1,), (64,), (x, y, x.size), shared=256)
        return y

    pair = (launch, lambda dy, x, *, empty: launch(x, empty=empty))
    op = gl.op("added", lambda x: x.sum(), lambda dy, x: dy + 0 * x, shape=lambda x: (), cuda=pair)
    with pytest.raises(CheckError, match="add_float32 for sm_90: 1 floating-point atomics"):
        audit_op(op, Spec((64,), float32), archs=[90], backend="cuda")
    with pytest.raises(gl.Refused):
        audit_op(gl.op("bare", one, lambda dy: dy), Spec((64,), float32), backend="cuda")


def test_an_op_is_measured(monkeypatch):
    pytest.importorskip("torch")
    from gpulayers.bench.measuring.device import device
    from gpulayers.bench.own import bench_op

    slow = {"copy": 1e12, "read": 1e12, "float32": 1e12}
    monkeypatch.setattr(type(device("cpu")), "limits", lambda self: slow)
    op = gl.op("plain", lambda x: x * x, lambda dy, x: 2 * dy * x)
    rows = bench_op(op, (8, 8), dtypes=["float32"], rounds=1, on="cpu", show=False)
    assert [(r["direction"], r["provider"], r["status"]) for r in rows] == [
        (direction, "definition", "ok") for direction in ("forward", "backward", "both")
    ]


# --- from a shell ----------------------------------------------------------------------------------------------------

FILE = """
import triton
from own_kernels import double_kernel, double_too_far_kernel

import gpulayers as gl


def launch(x, *, empty):
    y = empty(x.shape, x.dtype)
    KERNEL[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y


doubled = gl.op("doubled", lambda x: 2 * x, lambda dy: 2 * dy, triton=(launch, lambda dy, *, empty: launch(dy, empty=empty)))
"""


@pytest.fixture
def shell(tmp_path, monkeypatch, capsys):
    """Runs a command on an op in a file with one of the kernels; (status, stdout, stderr)."""
    pytest.importorskip("triton")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(command: str, *words: str, kernel: str = "double_kernel", name: str = "doubled") -> tuple[int, str, str]:
        (tmp_path / "doubled_op.py").write_text(FILE.replace("KERNEL", kernel))
        sys.modules.pop("doubled_op", None)
        status = cli.main([command, f"{tmp_path}/doubled_op.py:{name}", *words])
        return status, *capsys.readouterr()

    yield run
    sys.modules.pop("doubled_op", None)


def test_check_from_a_shell(shell):
    shape = ("--input-shape", "3,5", "--dtypes", "float32")
    status, out, _ = shell("check", *shape)
    assert status == 0 and "without races: definition, triton" in out and out.count("double_kernel") == 3
    from gpulayers.testing.interpreter import interpreting

    with interpreting():  # on a GPU, too
        status, out, err = shell("check", *shape, kernel="double_too_far_kernel")
    assert status == 1 and not out and "load out of bounds" in err and err.count("\n") == 1
    status, _, err = shell("check")
    assert status == 2 and "doubled: the rule is --input-shape with a shape for each of x; got 0" in err


def test_explain_from_a_shell(shell):
    status, out, _ = shell("explain", "--shapes", "3,4")
    assert status == 0 and "doubled_op.doubled(x)" in out and "computes it" in out
    assert "kernels: triton, and the definition" in shell("explain")[1]
    status, _, err = shell("explain", name="launch")
    assert status == 2 and "doubled_op.py has no layer 'launch'" in err


def test_bench_from_a_shell(shell, monkeypatch):
    pytest.importorskip("torch")
    from gpulayers.bench import own

    asked = []
    monkeypatch.setattr(own, "bench_op", lambda op, *shapes, **how: asked.append((op.name, shapes, how["on"])) or [])
    assert shell("bench", "--input-shape", "8,8", "--cpu")[0] == 0 and asked == [("doubled", ((8, 8),), "cpu")]
    assert "the rule is --input-shape with a shape for each of x; got 0" in shell("bench", "--cpu")[2]
