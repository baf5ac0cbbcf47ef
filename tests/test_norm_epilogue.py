"""Batch norm with what may follow it in the same pass: a residual, an activation."""

import numpy as np
import pytest
from halves import check_op
from test_norm import against_torch, draw, last, running
from test_norm import launched as launched

from gpulayers.arrays import bfloat16
from gpulayers.ops.norm import batch_norm
from gpulayers.testing.arena import arena

torch = pytest.importorskip("torch")
gt = pytest.importorskip("gpulayers.torch")
from gpulayers.torch import functional  # noqa: E402
from gpulayers.torch import norm as gt_norm  # noqa: E402
from gpulayers.torch._epilogue import applied  # noqa: E402

F = torch.nn.functional
EPILOGUES = [("relu", True), ("relu", False), ("silu", True), (None, True)]
"""(activation, with a residual): f' from y, and from z computed again."""
epilogues = pytest.mark.parametrize("activation, added", EPILOGUES)
C = 4


def images(added: bool, *, seed: int = 0) -> list:
    """x, weight, bias, running statistics and residual, in row-major memory."""
    shape = (3, C, 2, 5)
    residual = draw(*shape, seed=5) if added else None
    return [draw(*shape, seed=seed) - 1, draw(C, seed=1), draw(C, seed=2) - 1, *running(C), residual]


@epilogues
@pytest.mark.parametrize("training", [True, False])
def test_by_definition(activation, added, training):
    options = dict(training=training, activation=activation, dtypes=["float64", "float16"], backends=("definition",))
    check_op(batch_norm, *images(added), numeric=True, **options)
    x, *_, residual = images(added)
    check_op(batch_norm, x, None, None, None, None, residual, **options)


@epilogues
def test_in_kernels(activation, added, launched):
    """Both memory orders, and a residual in the other one; float32 weights with 16-bit images."""
    x, *others, residual = images(added)
    options = dict(activation=activation, dys=["dense"])
    ran = check_op(batch_norm, x, *others, residual, training=True, dtypes=["float32", "bfloat16"], **options)
    assert {"numpy", "triton"} <= set(ran)
    other = None if residual is None else last(residual)
    check_op(batch_norm, x, others[0], None, *others[2:], other, dtypes=["float32"], **options)
    check_op(batch_norm, last(x), *others, other, training=True, dtypes=["float32"], **options)
    half = [None if a is None else a.astype(bfloat16) for a in (last(x), residual)]
    wide = [a.astype(np.float32) for a in others]
    check_op(batch_norm, half[0], *wide, half[1], dtypes=["float32"], **options)
    assert launched >= {f"_batch_norm_{k}_kernel" for k in ("moments", "forward", "sums", "backward")}


@pytest.mark.parametrize("activation", ["hardtanh", "softplus"])
def test_activations_have_their_numbers(activation):
    check_op(batch_norm, *images(False), activation=activation, dtypes=["float32"], dys=["dense"])


@pytest.mark.parametrize("activation, kept", [(None, ()), ("tanh", ("y",)), ("gelu", ("bias", "residual"))])
def test_what_an_epilogue_saves(activation, kept):
    _, call = batch_norm.record(*images(True), training=True, activation=activation)
    assert set(call.saved) == {"x", "mean", "rstd", "weight", *kept}


@pytest.mark.parametrize("backend", ["definition", "numpy", "triton"])
def test_an_epilogue_changes_no_statistic(backend):
    found = []
    for activation, added in ((None, False), ("relu", True)):
        given = [None if a is None else a.astype(np.float32) for a in images(added)]
        with arena(backend) as room:
            there = room.put(given)
            batch_norm(*there, training=True, activation=activation)
            found.append([room.get(a).tobytes() for a in there[3:5]])
    assert found[0] == found[1] != [given[3].tobytes(), given[4].tobytes()]


@epilogues
@pytest.mark.parametrize("training", [True, False])
def test_as_torch(activation, added, training):
    def theirs(x, w, b, m, v, r):
        y = F.batch_norm(x, m, v, w, b, training=training)
        y = y if r is None else y + r
        return y if activation is None else getattr(F, activation)(y)

    needs = ("x", "weight", "bias", "residual")
    against_torch(batch_norm, images(added), theirs, needs, training=training, activation=activation)


def tensors(added: bool, **kind) -> list:
    """images, of which those with gradients require one."""
    found = [None if a is None else torch.tensor(a, **kind) for a in images(added)]
    for i in (0, 1, 2, 5)[: 3 + added]:
        found[i].requires_grad_()
    return found


def in_torch(training: bool, activation: str | None):
    """Our function and torch's of ``tensors``; running statistics are left as they are."""

    def ours(x, w, b, m, v, r):
        given = (x, m.detach().clone(), v.detach().clone(), w, b, training)
        return functional.batch_norm(*given, residual=r, activation=activation)

    def theirs(x, w, b, m, v, r):
        y = F.batch_norm(x, m.detach().clone(), v.detach().clone(), w, b, training)
        return applied(activation, y if r is None else y + r)

    return ours, theirs


@epilogues
@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_gradients(activation, added, training):
    given = [
        t if t is None else t[:2, :2, :1, :3] if t.ndim == 4 else t[:2] for t in tensors(added, dtype=torch.float64)
    ]
    given = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in given]
    ours, theirs = in_torch(training, activation)
    torch.testing.assert_close(ours(*given), theirs(*given))
    assert torch.autograd.gradcheck(ours, given) and torch.autograd.gradgradcheck(ours, given)


@pytest.mark.parametrize("activation, added", EPILOGUES[:3:2])
def test_where_torch_traces(activation, added):
    x, w, b, m, v, r = given = tensors(added, dtype=torch.float32)
    op = gt_norm._batch_norm.library.forward
    options = (True, 0.1, 1e-5, activation, True)
    torch.library.opcheck(op, (x, w, b, m, v, r, *options), test_utils=("test_schema", "test_faketensor"))
    ours, _ = in_torch(True, activation)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    wanted, got = ([y, *torch.autograd.grad(y.sin().sum(), given[:3])] for y in (ours(*given), compiled(*given)))
    torch.testing.assert_close(got, wanted)


def test_a_layer_and_its_epilogue():
    """In autocast and channels last, as bn, + and relu one after the other; a residual that does not fit is torch's."""
    layer, plain = gt.BatchNorm2d(C), torch.nn.BatchNorm2d(C)
    x = torch.tensor(images(False)[0], dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    for residual in (x.cos(), x.double(), x[:1, :, :1], None):
        with torch.autocast("cpu", torch.bfloat16):
            y, wanted = layer.fused(x, residual, "relu"), plain(x)
        wanted = F.relu(wanted if residual is None else wanted + residual)
        torch.testing.assert_close(y, wanted)
        assert y.stride() == wanted.stride()
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())
    with pytest.raises(ValueError, match="activation ∈"):
        layer.fused(x, x, "swish")
