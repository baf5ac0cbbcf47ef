"""Layer norm and RMS norm of a sum: as the sum followed by the norm, in one pass and with one gradient for both summands."""

import contextlib
import itertools

import numpy as np
import pytest
from gpulayers.kernels.triton import _configs, _tile
from halves import check_op

import gpulayers as gl
from gpulayers import launch
from gpulayers.arrays import bfloat16
from gpulayers.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from gpulayers.testing.arena import arena
from gpulayers.testing.check_layer import check_layer

torch = pytest.importorskip("torch")

from gpulayers.testing.check_torch import check_torch  # noqa: E402
from gpulayers.torch import norm as drop_ins  # noqa: E402
from gpulayers.torch.functional import add_layer_norm as add_layer_norm_of_tensors  # noqa: E402
from gpulayers.torch.functional import add_rms_norm as add_rms_norm_of_tensors  # noqa: E402

F = torch.nn.functional
OPS = {"layer": (add_layer_norm, layer_norm), "rms": (add_rms_norm, rms_norm)}
both = pytest.mark.parametrize("kind", OPS)
CALLS = [(k, b) for k in OPS for b in ("definition", "numpy", "aten", "triton") if (k, b) != ("rms", "aten")]


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape) * 2 + 1


def given(kind: str, x: np.ndarray, shape: tuple, residual: np.ndarray | None = None) -> list[np.ndarray]:
    """x, another summand and the weights."""
    residual = draw(*x.shape, seed=3) if residual is None else residual
    return [x, residual, *(draw(*shape, seed=i) for i in (1, 2)[: 1 + (kind == "layer")])]


# --- the definitions -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("x, tail", [((3, 5), 1), ((2, 3, 4), 2), ((4,), 1), ((0, 3), 1), ((3, 0), 1), ((1, 1), 1)])
def test_by_definition(kind, x, tail):
    op, shape = OPS[kind][0], x[-tail:]
    check_op(op, *given(kind, draw(*x), shape), normalized_shape=shape, numeric=True)
    options = dict(eps=0.1, dys=["dense", "transposed"], dtypes=["float32"])
    check_op(op, *given(kind, draw(*x), shape)[:2], normalized_shape=shape, **options)


# --- the kernels, branch by branch -----------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch):
    """Names of the Triton kernels that were launched, as for a GPU of 4 multiprocessors."""
    names, device, plain = set(), _tile.device, _tile.launch
    monkeypatch.setattr(_tile, "device", lambda x: device(x)._replace(sms=4))

    def note(kernel, grid, *args, **options):
        names.add(kernel.fn.__name__)
        plain(kernel, grid, *args, **options)

    monkeypatch.setattr(_tile, "launch", note)
    return names


@pytest.fixture
def short_blocks():
    """Every row counts as long, and is walked 32 elements at a time."""
    with contextlib.ExitStack() as stack:
        for direction in ("norm_forward", "norm_backward"):
            stack.enter_context(_configs.forced(direction, None))
            stack.enter_context(_configs.forced(f"{direction}.walked", _configs.Row(None, 32, 8)))
        yield


@both
@pytest.mark.parametrize("m, n", [(70, 24), (2, 1100)], ids=["several rows a program", "one"])
def test_short_rows(kind, m, n, launched):
    served = check_op(OPS[kind][0], *given(kind, draw(m, n), (n,)), normalized_shape=(n,), dys=["dense", "gapped"])
    assert served == ["aten", "definition", "numpy", "triton"][kind == "rms" :]
    assert {"_norm_forward_kernel", "_norm_backward_kernel", "_norm_finalise_kernel"} <= launched


@both
def test_long_rows(kind, launched, short_blocks):
    """Enough rows for a program each."""
    check_op(OPS[kind][0], *given(kind, draw(9, 70), (70,)), normalized_shape=(70,), dys=["dense"])
    assert {"_norm_forward_looped_kernel", "_norm_sums_kernel", "_norm_backward_columns_kernel"} <= launched
    assert "_norm_moments_of_sum_kernel" not in launched


@both
def test_few_long_rows(kind, launched, short_blocks):
    """Several programs share a row: each writes its own part of the sum, and reads no other."""
    check_op(OPS[kind][0], *given(kind, draw(2, 150), (150,)), normalized_shape=(150,), dys=["expanded"])
    assert {"_norm_moments_of_sum_kernel", "_norm_forward_split_kernel", "_norm_backward_columns_kernel"} <= launched


@both
def test_summands_of_other_strides(kind):
    """Each has its own step from row to row, or is copied; what neither kernel takes as it lies."""
    x, turned = draw(8, 60)[::2, :24], np.asfortranarray(draw(4, 24))
    for summands in ((x, draw(4, 40)[:, :24]), (turned, turned), (x, np.broadcast_to(draw(24), (4, 24)))):
        inputs = given(kind, summands[0], (24,), summands[1])
        check_op(OPS[kind][0], *inputs, normalized_shape=(24,), dys=["dense"], dtypes=["float32", "bfloat16"])


@both
@pytest.mark.parametrize("m, n", [(9, 70), (2, 150)])
def test_long_rows_that_lie_apart(kind, m, n, launched, short_blocks):
    inputs = given(kind, draw(m, n + 10)[:, :n], (n,), draw(m, n + 20)[:, :n])
    check_op(OPS[kind][0], *inputs, normalized_shape=(n,), dys=["gapped"], dtypes=["float32"], backends=("triton",))
    assert "_copy_kernel" not in launched


@both
def test_float32_weights(kind):
    """Mixed precision: 16-bit summands, float32 weights and their gradients."""
    for dtype in (np.float16, bfloat16):
        x, residual, *weights = given(kind, draw(6, 40), (40,))
        weights = [w.astype(np.float32) for w in weights]
        halves = x.astype(dtype), residual.astype(dtype)
        check_op(OPS[kind][0], *halves, *weights, normalized_shape=(40,), dtypes=["float32"], dys=["dense"])


MIXED = {
    "residual of 32 bits": (bfloat16, np.float32, None),
    "y of 16 bits": (bfloat16, np.float32, "bfloat16"),
    "x of 32 bits": (np.float32, np.float16, "float16"),
    "a float32 sum": (np.float32, np.float32, "bfloat16"),
}


@pytest.mark.parametrize(
    "name, kind, m, n, walked",
    [
        *((name, "layer", 33, 24, False) for name in MIXED),
        ("y of 16 bits", "rms", 9, 70, True),
        ("x of 32 bits", "layer", 2, 150, True),
    ],
)
def test_mixed_dtypes(name, kind, m, n, walked, launched, request):
    """A residual stream of 32 bits, and what a block adds to it of 16; the next block may want 16."""
    if walked:
        request.getfixturevalue("short_blocks")
    of_x, of_residual, dtype = MIXED[name]
    x, residual, *weights = given(kind, draw(m, n), (n,))
    weights = [w.astype(np.float32) for w in weights]
    inputs = [x.astype(of_x), residual.astype(of_residual), *weights]
    options = dict(normalized_shape=(n,), dtype=dtype)
    served = check_op(OPS[kind][0], *inputs, **options, dtypes=["float32"], dys=["dense"])
    assert {"definition", "triton"} == {*served} and "_norm_finalise_kernel" in launched
    (y, total), grads = recorded("triton", OPS[kind][0], inputs, [None, draw(m, n).astype(np.float32)], **options)
    assert (str(y.dtype), total.dtype) == (dtype or "float32", np.float32)
    assert [g.dtype for g in grads] == [a.dtype for a in inputs]


@both
def test_the_bits_of_a_cast(kind):
    """y of 16 bits is the wide one rounded, and gradients are those that casts around the op would give."""
    op = OPS[kind][0]
    x, residual, *weights = (a.astype(np.float32) for a in given(kind, draw(6, 40), (40,)))
    x, dy = x.astype(bfloat16), draw(6, 40, seed=9).astype(bfloat16)
    dsum = draw(6, 40, seed=8).astype(np.float32)
    options = dict(normalized_shape=(40,))
    (y, total), grads = recorded("triton", op, [x, residual, *weights], [dy, dsum], dtype="bfloat16", **options)
    wide = [x.astype(np.float32), residual, *weights]
    (alone, its), wanted = recorded("triton", op, wide, [dy.astype(np.float32), dsum], **options)
    np.testing.assert_array_equal(y, alone.astype(bfloat16))
    np.testing.assert_array_equal(total, its)
    for got, true in zip(grads, wanted):
        np.testing.assert_array_equal(got, true.astype(got.dtype))


def recorded(backend: str, op, inputs: list, dys: list, needs=None, **options) -> tuple[list, list]:
    """(outputs, gradients) of one backend."""
    with arena(backend) as room:
        ys, call = op.record(*room.put(inputs), needs=needs, **options)
        ys = ys if isinstance(ys, tuple) else (ys,)
        own = room.put(dys)
        grads = room.get(list(call.backward(*own)))
        assert room.real or not any(
            np.shares_memory(*pair) for pair in itertools.product(grads, [d for d in room.get(own) if d is not None])
        )
        return room.get(list(ys)), grads


@pytest.mark.parametrize("kind, backend", [*CALLS, *((kind, "triton, walked") for kind in OPS)])
def test_the_bits_of_the_sum_followed_by_the_norm(kind, backend, request):
    """In the same backend; where the sum has no gradient of its own, the norm's gradients too, of one array for both."""
    if backend == "triton, walked":
        request.getfixturevalue("short_blocks")
    backend = backend.partition(",")[0]
    dtype = bfloat16 if backend == "triton" else np.float32
    op, norm = OPS[kind]
    x, residual, *weights = (a.astype(dtype) for a in given(kind, draw(5, 150), (150,)))
    dy = draw(5, 150, seed=9).astype(dtype)
    (y, total), grads = recorded(backend, op, [x, residual, *weights], [dy, None], normalized_shape=(150,))
    np.testing.assert_array_equal(total, x + residual)
    (alone,), (dx, *others) = recorded(backend, norm, [x + residual, *weights], [dy], normalized_shape=(150,))
    np.testing.assert_array_equal(y, alone)
    for got, true in zip(grads, (dx, dx, *others)):
        np.testing.assert_array_equal(got, true)
    assert np.shares_memory(*grads[:2])


@pytest.mark.parametrize("kind, backend", CALLS)
@pytest.mark.parametrize("lie", [np.array, np.asfortranarray], ids=["dense", "transposed"])
def test_only_the_sum_is_used(kind, backend, lie):
    """Its gradient is that of both summands, a copy of it, whatever the norm would make of NaN; the weights have none."""
    inputs = [a.astype(np.float32) for a in given(kind, draw(6, 24), (24,))]
    inputs[0][2, 3] = np.nan
    dsum = lie(draw(6, 24, seed=9).astype(np.float32))
    _, (dx, dresidual, *others) = recorded(backend, OPS[kind][0], inputs, [None, dsum], normalized_shape=(24,))
    np.testing.assert_array_equal(dx, dsum)
    assert np.shares_memory(dx, dresidual) and dx.flags.c_contiguous
    assert all(not g.any() for g in others) and len(others) == len(inputs) - 2


@pytest.mark.parametrize("kind, backend", CALLS)
def test_a_row_of_one_passes_the_gradient_of_the_sum(kind, backend):
    """The norm's own is 0 there, but for RMS norm's of eps."""
    inputs = [a.astype(np.float32) for a in given(kind, draw(8, 1) + 4096, (1,))]
    dy, dsum = (draw(8, 1, seed=i).astype(np.float32) for i in (8, 9))
    _, (dx, *_) = recorded(backend, OPS[kind][0], inputs, [dy, dsum], normalized_shape=(1,))
    np.testing.assert_allclose(dx, dsum, rtol=1e-6, atol=1e-9)


@both
def test_errors(kind):
    x = draw(3, 4)
    wrong = {"residual.shape = x.shape = [3, 4]; got [4]": x[0], "residual.dtype = x.dtype": x.astype(np.float32)}
    for text, residual in wrong.items():
        with pytest.raises(RuntimeError) as raised:
            OPS[kind][0](x, residual, normalized_shape=(4,))
        assert str(raised.value).startswith(f"add_{kind}_norm: residual: the rule is ") and text in str(raised.value)
    with pytest.raises(
        RuntimeError, match="one of them float32 and the other of 16 bits; got residual float16 with x bf"
    ):
        OPS[kind][0](x.astype(bfloat16), x.astype(np.float16), normalized_shape=(4,))
    with pytest.raises(ValueError, match="dtype: the rule is None, 'float64'; got 'bfloat16' with a float64 sum"):
        OPS[kind][0](x, x, normalized_shape=(4,), dtype="bfloat16")


# --- torch -----------------------------------------------------------------------------------------------------------


OURS = {"layer": add_layer_norm_of_tensors, "rms": add_rms_norm_of_tensors}


def tensors(kind: str, dtype=torch.float64, shape=(2, 3, 5), grad=True) -> list:
    found = [torch.tensor(a).to(dtype) for a in given(kind, draw(*shape), shape[-1:])]
    return [t.requires_grad_(grad) for t in found]


def theirs(kind: str):
    norm = {"layer": F.layer_norm, "rms": F.rms_norm}[kind]

    def call(x, residual, shape, *weights):
        total = x + residual
        return norm(total, shape, *weights), total

    return call


@both
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_as_torch(kind, dtype):
    """Outputs and gradients; residuals of another shape or dtype are torch's own affair."""
    x, residual, *weights = tensors(kind, dtype, grad=False)
    turned = residual.transpose(0, -1).contiguous().transpose(0, -1)
    for other in (residual, turned, residual[:1], residual.double()):
        ours, its = ((lambda x, r, *w, f=f: f(x, r, (5,), *w)) for f in (OURS[kind], theirs(kind)))
        assert check_torch(ours, its, [x, other, *weights]) == []
        assert check_torch(ours, its, [x, other]) == []


@both
def test_mixed_dtypes_as_torch(kind):
    """A residual of 32 bits beside an x of 16: eager, traced as one op, and differentiated twice."""
    x, residual, *weights = tensors(kind, torch.float32)
    halves, dtype = x.detach().bfloat16().requires_grad_(), torch.bfloat16
    ours = lambda x, r, *w: OURS[kind](x, r, (5,), *w, dtype=dtype)  # noqa: E731
    its = lambda x, r, *w: (theirs(kind)(x, r, (5,), *w)[0].to(dtype), x + r)  # noqa: E731
    assert check_torch(ours, its, [halves.detach(), residual.detach(), *[w.detach() for w in weights]]) == []
    library = {"layer": drop_ins._add_layer_norm, "rms": drop_ins._add_rms_norm}[kind].library
    leaves, found = [halves, residual, *weights], []
    for call in (ours, lambda *ins: library((*ins, (5,), 1e-5, "bfloat16"), True)):
        y, total = call(*leaves)
        assert (y.dtype, total.dtype) == (dtype, torch.float32)
        found.append(torch.autograd.grad(y.float().exp().sum() + total.exp().sum(), leaves))
        assert [g.dtype for g in found[-1]] == [t.dtype for t in leaves]
    for mine, its_own in zip(*found):
        torch.testing.assert_close(mine, its_own, rtol=1e-2, atol=1e-4)
    torch.library.opcheck(library.forward, (*leaves, (5,), 1e-5, "bfloat16", True), test_utils="test_faketensor")
    again = []
    for call in (ours, its):
        y, total = call(*leaves)
        grads = torch.autograd.grad(total.square().sum() + y.float().sum(), leaves, create_graph=True)
        again.append(torch.autograd.grad(sum(g.square().sum() for g in grads[1:]), leaves[1:3]))  # those of 32 bits
    for mine, wanted in zip(*again):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-3)


@both
def test_both_summands_get_one_gradient(kind):
    """As a sum of torch's gives it: what is accumulated into one of them must not reach the other."""
    x, residual, *weights = tensors(kind)
    y, total = OURS[kind](x, residual, (5,), *weights)
    (y.sum() + (total * total).sum()).backward()
    assert torch.equal(x.grad, residual.grad)
    before = residual.grad.clone()
    x.grad.zero_()
    assert torch.equal(residual.grad, before)


@both
def test_gradients_that_are_added_up_on_their_way(kind):
    """Both summands come from one leaf, by roads of different lengths, where autograd adds in place."""
    leaf = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    found = []
    for call in (OURS[kind], theirs(kind)):
        a, b = leaf * 2, leaf.sin()
        y, total = call(a, b, (5,))
        loss = (y * y).sum() + (total.exp() * a).sum() + (b * 3).sum()
        found.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(*found)


@both
@pytest.mark.parametrize("used", [*itertools.product((True, False), repeat=2)])
def test_gradients_of_gradients(kind, used):
    """Of y, of the sum, of both, and of gradients alone."""
    found = []
    for call in (OURS[kind], theirs(kind)):
        leaves = tensors(kind)
        y, total = call(*leaves[:2], (5,), *leaves[2:])
        dys = [torch.linspace(-1, 2, 30, dtype=torch.float64).reshape(y.shape).requires_grad_() for _ in range(2)]
        grads = torch.autograd.grad([y, total], leaves, dys, create_graph=True)
        loss = sum(g.square().sum() for g in grads)
        loss = loss + sum(t.pow(3).sum() for t, use in zip((y, total), used) if use)
        found.append([*grads, *torch.autograd.grad(loss, [*leaves, *dys], materialize_grads=True)])
    torch.testing.assert_close(*found)


@both
def test_only_one_gradient_is_wanted(kind):
    for wanted in itertools.product((True, False), repeat=2):
        if any(wanted):
            found = []
            for call in (OURS[kind], theirs(kind)):
                x, residual, *weights = tensors(kind, grad=False)
                leaves = [t.requires_grad_() for t, want in zip((x, residual), wanted) if want]
                y, total = call(x, residual, (5,), *weights)
                found.append(torch.autograd.grad((y * y).sum() + total.exp().sum(), leaves))
            torch.testing.assert_close(*found)


def test_compiled():
    """In one graph, as in eager mode."""

    def loss(calls, x, residual, weight, bias):
        y, total = calls["layer"](x, residual, (5,), weight, bias)
        y, total = calls["rms"](y, total, (5,), weight)
        return y.square().sum() + total.exp().sum(), y

    torch.compiler.reset()
    graph = torch.compile(loss, backend="aot_eager", fullgraph=True)
    found = []
    for run, calls in ((graph, OURS), (loss, {kind: theirs(kind) for kind in OPS})):
        leaves = tensors("layer")
        total, y = run(calls, *leaves)
        found.append([y, *torch.autograd.grad(total, leaves)])
    torch.testing.assert_close(*found)


@both
def test_custom_ops_share_no_memory(kind, monkeypatch):
    """The gradient of both summands is there once, in the layout of the first that wants one."""
    library = {"layer": drop_ins._add_layer_norm, "rms": drop_ins._add_rms_norm}[kind].library
    backward, calls = library.backward, []
    monkeypatch.setattr(library, "backward", lambda *args: calls.append(args) or backward(*args))
    for wanted in ((True, True), (False, True)):
        x, residual, *weights = tensors(kind, torch.float32)
        x.requires_grad_(wanted[0])
        residual = residual.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(wanted[1])
        y, total = library((x, residual, *weights, (5,), 1e-5, None), True)
        grads = torch.autograd.grad(y.exp().sum() + total.exp().sum(), [t for t in (x, residual) if t.requires_grad])
        assert all(torch.equal(g, grads[0]) for g in grads)
    assert len(calls) == 2
    for args in calls:
        torch.library.opcheck(backward, args, test_utils=("test_schema", "test_faketensor"))
        found = [g for g in backward(*args) if g.numel()]
        assert len({g.untyped_storage().data_ptr() for g in found}) == len(found)
    torch.library.opcheck(library.forward, (*tensors(kind, torch.float32), (5,), 1e-5, None, True))


@both
def test_functional_transforms(kind):
    """torch.func goes through torch's own functions; vmap over the summands."""
    x, residual, *weights = tensors(kind, grad=False)
    found = []
    for call in (OURS[kind], theirs(kind)):

        def value(x, r, call=call):
            y, total = call(x, r, (5,), *weights)
            return (y * total).sum()

        found.append(torch.func.vmap(torch.func.grad(value, argnums=(0, 1)))(x, residual))
    torch.testing.assert_close(*found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
@both
def test_steps_are_played(kind, driver, monkeypatch):
    """Forward and backward, with one array for both summands; a backward of two gradients takes no detour either."""
    leaves = tensors(kind, torch.bfloat16, (8, 64))

    def step():
        y, total = OURS[kind](*leaves[:2], (64,), *leaves[2:])
        return torch.autograd.grad([y, total], leaves, [torch.ones_like(y), torch.ones_like(total)])

    for _ in range(5):
        step()
    monkeypatch.setattr(launch.Backward, "__call__", None)
    before = driver.launches
    dx, dresidual, *_ = step()
    assert driver.launches == before + 3 and dx.data_ptr() == dresidual.data_ptr()


@both
def test_the_layer(kind):
    """Two inputs, the norm of their sum and the sum; its weights are those of the norm's own layer."""
    added, alone = {"layer": (gl.AddLayerNorm(6), gl.LayerNorm(6)), "rms": (gl.AddRMSNorm(6), gl.RMSNorm(6))}[kind]
    x, residual = draw(2, 6).astype(np.float32), draw(2, 6, seed=1).astype(np.float32)
    y, total = added(x, residual)
    np.testing.assert_array_equal(total, x + residual)
    np.testing.assert_allclose(y, alone(total), rtol=1e-5, atol=1e-6)
    check_layer(added, (None, 6), (None, 6))
