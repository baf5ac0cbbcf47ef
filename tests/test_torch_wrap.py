"""gpulayers.torch.wrap: layers of one's own as torch modules."""

import copy
import pickle

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.autograd.forward_ad as forward_ad  # noqa: E402
import torch.nn as nn  # noqa: E402
from recorded.array_layers import Swish  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402

import gpulayers as gl  # noqa: E402
from gpulayers.torch import wrap  # noqa: E402
from gpulayers.transfer import torch_to_numpy  # noqa: E402


def swish(x, beta):
    return x * torch.sigmoid(beta * x)


class Mixed(gl.Layer):
    """(a, b) → (a w, a + b, how often it ran): several inputs and outputs, a view saved, the same dx twice."""

    def build(self, a, b):
        self.w = self.add_weight("w", a[1:], init="normal")
        self.count = self.add_weight("count", (), trainable=False, dtype="int64")
        self.mean = self.add_weight("mean", a[1:], trainable=False)

    def output_shape(self, a, b):
        return a, a, ()

    def forward(self, a, b):
        self.count.data = self.count.data + 1
        if self.training:
            self.mean.data[...] = a.mean(0)
        self.save(a[::2], {"odd": [a[1::2]]})
        return a * self.w, a + b, np.asarray(self.count.data)

    def backward(self, dy, dz, _):
        even, odd = self.saved
        self.w.grad += (dy[::2] * even).sum(0) + (dy[1::2] * odd["odd"][0]).sum(0)
        return dy * self.w + dz, dz


class Tanh(gl.Layer):
    """Saves its output."""

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        y = np.tanh(x)
        self.save(y)
        return y

    def backward(self, dy):
        (y,) = self.saved
        return dy * (1 - y * y)


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def grads(y, *of):
    return torch.autograd.grad(y.square().sum(), of)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_gradients_are_torchs(dtype):
    module = wrap(Swish(), (None, 3)).to(dtype)
    assert isinstance(module, torch.nn.Module) and list(dict(module.named_parameters())) == ["beta"]
    x = draw(4, 3, dtype=dtype)
    y, plain = module(x), swish(x, module.beta)
    assert y.dtype is dtype
    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(grads(y, x, module.beta), grads(plain, x, module.beta))
    wide = draw(3, 4, dtype=dtype)  # strided x, expanded dy
    (dx,) = torch.autograd.grad(module(wide.t()).sum(), wide)
    torch.testing.assert_close(dx, torch.autograd.grad(swish(wide.t(), module.beta).sum(), wide)[0])
    assert torch.autograd.gradcheck(wrap(Swish(), (None, 3)).double(), draw(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_the_layers_own(dtype):
    """The same bits as natively."""
    layer = gl.Sequential(gl.Linear(3, 4), Swish())
    module = wrap(layer, (None, 3))
    x = draw(4, 3, dtype=dtype)
    y = module(x)
    native = layer(torch_to_numpy(x))
    mine = [y, *torch.autograd.grad(y.sum(), (x, *module.parameters()))]
    dx = layer.backward(np.ones_like(native))
    assert y.dtype is mine[1].dtype is dtype
    for got, want in zip(mine, [native, dx, *(w.grad for w in layer.weights)]):
        assert np.array_equal(torch_to_numpy(got), want)


def test_memory_is_shared_and_changes_are_seen():
    layer = Swish()
    module = wrap(layer, (None, 3))
    assert layer.beta.data == 1.5
    with torch.no_grad():
        module.beta.fill_(0.5)
    assert layer.beta.data == 0.5
    x = draw(2, 3)
    pointers = []
    layer.forward = lambda x, forward=layer.forward: pointers.append(x.ctypes.data) or forward(x)
    torch.testing.assert_close(module(x), swish(x, module.beta))
    assert pointers == [x.data_ptr()]
    module.beta = torch.nn.Parameter(torch.tensor(0.25))
    torch.testing.assert_close(module(x), swish(x, module.beta))
    assert layer.beta.data == 0.5 and module.layer.beta.data == 0.25  # module.layer looks again
    layer(x.detach().numpy())
    layer.backward(np.ones((2, 3), np.float32))  # natively it still works
    assert module.beta.grad is None and layer.beta.has_grad


def test_several_inputs_and_outputs():
    module = wrap(Mixed(), (None, 3), (None, 3))
    assert [n for n, _ in module.named_buffers()] == ["count", "mean"]
    a, b = draw(4, 3), draw(4, 3, seed=1)
    for step in (1, 2):
        y, z, count = module(a, b)
        assert count == module.count == step and not count.requires_grad
        torch.testing.assert_close(module.mean, a.detach().mean(0))
    torch.testing.assert_close((y, z), (a * module.w, a + b))
    first, second = (a * module.w).sum(), 2 * (a + b).sum()
    for mine, plain in ((y.sum() + 2 * z.sum(), first + second), (y.sum(), first), (2 * z.sum(), second)):
        found = [
            torch.autograd.grad(f, (a, b, module.w), retain_graph=True, allow_unused=True, materialize_grads=True)
            for f in (mine, plain)
        ]
        torch.testing.assert_close(*found)
    (y + z).sum().backward()
    assert a.grad.data_ptr() != b.grad.data_ptr()  # one array came back for both
    module.eval()
    before = module.mean.clone()
    module(a + 1, b)
    assert torch.equal(module.mean, before)


def test_calls_in_any_order():
    """Two forwards before the backwards, in either order, and one backward twice."""
    module = wrap(gl.Sequential(Swish(), gl.Linear(3, 3), Tanh(), gl.LayerNorm(3)), (None, 3))
    a, b = draw(4, 3), draw(5, 3, seed=1)
    alone = [grads(module(x), x, *module.parameters()) for x in (a, b)]
    for order in ((0, 1), (1, 0)):
        ys = [module(a), module(b)]
        for i in order:
            for _ in range(2):
                again = torch.autograd.grad(ys[i].square().sum(), ((a, b)[i], *module.parameters()), retain_graph=True)
                assert all(map(torch.equal, again, alone[i]))
    assert not any(layer._waiting.frames for layer in module.layer.layers())
    module(a), module(b).sum().backward()  # the first is never used
    assert not any(layer._waiting.frames for layer in module.layer.layers())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y = module(a).sum()
        y.backward(), y.backward()


def test_a_layer_used_twice_has_one_parameter():
    shared = gl.Linear(3, 3)
    module = wrap(gl.Sequential(shared, gl.Tanh(), shared), (None, 3))
    x = draw(2, 3)
    assert [n for n, _ in module.named_parameters()] == ["0.weight", "0.bias"]
    assert list(module.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]  # as in torch
    assert module.get_submodule("2") is module.get_submodule("0")
    w, b = module.get_submodule("0").weight, module.get_submodule("0").bias
    plain = torch.nn.functional.linear(torch.tanh(torch.nn.functional.linear(x, w, b)), w, b)
    torch.testing.assert_close(grads(module(x), x, w, b), grads(plain, x, w, b))


def tied():
    """(ours, torch's): the first weight is the last one, too; a batch norm is used twice."""
    layers = [gl.Linear(3, 3), gl.BatchNorm1d(3), gl.Tanh(), gl.Linear(3, 3)]
    native = gl.Sequential(*layers[:3], layers[1], layers[3])
    native.ensure_built((None, 3))
    native[4].weight = native[0].weight
    parts = [nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 3)]
    module = nn.Sequential(*parts[:3], parts[1], parts[3])
    module[4].weight = module[0].weight
    return wrap(native), module


def test_shared_weights_are_torchs():
    """Names, values and gradients; in state dicts from and to torch, copies, pickles, other dtypes, and one step of SGD."""
    ours, theirs = tied()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    x = draw(5, 3)
    for module in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours, ours.double()):
        plain, given = (t.to(next(module.parameters()).dtype) for t in (tied()[1], x))
        plain.load_state_dict(module.state_dict())
        for m in (module, plain):
            m.zero_grad()
            m(given).square().sum().backward()
            torch.optim.SGD(m.parameters(), 0.1).step()
        for name, t in plain.named_parameters():
            torch.testing.assert_close(module.get_parameter(name).grad, t.grad, rtol=1e-4, atol=1e-5)
        assert module.get_submodule("4").weight is module.get_submodule("0").weight
        torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-5)
    layer = ours.layer
    assert layer[4].weight is layer[0].weight and layer.ties()["4.weight"] == "0.weight"
    ours.get_submodule("4").weight = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"4.weight: the rule is the tensor that 0.weight is, as the layers share"):
        ours(x.double())


def test_writing_between_forward_and_backward_is_noticed():
    """To an input, an output or a parameter that backward needs; to others it is allowed."""
    x = draw(2, 3)
    for change in ("input", "view", "output", "parameter"):
        module = (
            wrap(Mixed(), (None, 3), (None, 3)) if change == "view" else wrap(gl.Sequential(Swish(), Tanh()), (2, 3))
        )
        z = x * 1
        y = module(z, z)[0] if change == "view" else module(z)
        with torch.no_grad():
            {"input": z, "view": z, "output": y, "parameter": next(module.parameters())}[change].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    module = wrap(Tanh())
    z = x * 1
    y = module(z)
    z.add_(1)  # only the output is saved
    y.sum().backward()


def test_checkpointing_replays_the_mask():
    module = wrap(gl.Sequential(gl.Linear(6, 6), gl.Dropout(0.5), Swish()), (None, 6))
    x = draw(8, 6)

    def run(call):
        torch.manual_seed(3)
        module.zero_grad()
        y = call(x)
        y.square().sum().backward()
        dx, x.grad = x.grad, None
        return [y.detach(), dx, *(p.grad for p in module.parameters())]

    plain = run(module)
    assert not all(map(torch.equal, plain, run(lambda x: module(module(x)))))
    for reentrant in (False, True):
        assert all(map(torch.equal, plain, run(lambda x: checkpoint(module, x, use_reentrant=reentrant))))  # noqa: B023
    assert torch.equal(module.eval()(x), module(x))


def test_what_is_saved_is_seen_by_hooks():
    """Checkpointing keeps none of it, and offloading moves it."""
    module, seen = wrap(gl.Sequential(Swish(), Tanh()), (None, 3)), []
    x = draw(4, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):
        y = module(x)
    assert sorted(t.numel() for t in seen) == [1, 12, 12, 12]  # beta, x, σ(βx), y
    torch.testing.assert_close(grads(y, x), grads(torch.tanh(swish(x, module.get_submodule("0").beta)), x))


def test_state_dicts_both_ways():
    layer, other = (gl.Sequential(gl.Linear(3, 4), gl.BatchNorm1d(4), Swish()) for _ in range(2))
    module = wrap(layer, (None, 3))
    module(draw(5, 3))
    assert list(module.state_dict()) == list(layer.state_dict())
    other.build((None, 3))
    other.load_state_dict(module.state_dict())
    x = draw(2, 3)
    module.eval(), other.eval()
    np.testing.assert_allclose(other(x.detach().numpy()), module(x).detach().numpy(), rtol=1e-6)
    module.load_state_dict({k: torch.tensor(v) * 2 for k, v in other.state_dict().items()})
    assert np.array_equal(module.layer.state_dict()["0.bias"], 2 * other.state_dict()["0.bias"])


def test_batch_norm_is_torchs():
    """Buffers that the op updates in place, and one that the layer replaces."""
    module, plain = wrap(gl.BatchNorm1d(4), (None, 4)), torch.nn.BatchNorm1d(4)
    for _ in range(3):
        x = draw(6, 4)
        torch.testing.assert_close(grads(module(x), x), grads(plain(x), x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.state_dict(), plain.state_dict())
    module.eval(), plain.eval()
    torch.testing.assert_close(module(x), plain(x))


def test_copies_and_pickles():
    module = wrap(gl.Sequential(gl.Linear(3, 2), gl.ReLU()), (None, 3))
    x = draw(2, 3)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert not torch.equal(other(x), module(x))


def test_the_rest_of_torch():
    """functional_call, weight_norm, modes, no_grad, frozen parameters, an optimizer, repr."""
    module = wrap(gl.Sequential(gl.Linear(3, 2), Swish()), (None, 3))
    x = draw(4, 3)
    half = {name: p.detach() * 0.5 for name, p in module.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(module, half, (x,)),
        swish(torch.nn.functional.linear(x, half["0.weight"], half["0.bias"]), half["1.beta"]),
    )
    y = module(x)
    torch.nn.utils.parametrizations.weight_norm(module.get_submodule("0"))
    torch.testing.assert_close(module(x), y)
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters()) and len(list(module.parameters())) == 4
    model = torch.nn.Sequential(module)
    assert not any(layer.training for layer in (model.eval() and module.layer).layers())
    assert all(layer.training for layer in (model.train() and module.layer).layers())
    assert not wrap(Tanh().eval()).training
    with torch.no_grad():
        assert not module(x).requires_grad
    with torch.inference_mode():
        module(x.detach())
    assert not module.requires_grad_(False)(x.detach()).requires_grad
    module(x).sum().backward()
    assert "Sequential(Linear(3, 2), Swish())" in repr(module)
    fresh = wrap(Swish(), (None, 3))
    gl.torch.optim.SGD(fresh.parameters(), lr=1.0).zero_grad()
    fresh(x).sum().backward()
    gl.torch.optim.SGD(fresh.parameters(), lr=1.0).step()
    assert fresh.beta.item() == pytest.approx(1.5 - fresh.beta.grad.item())


def test_ddp_and_fsdp(tmp_path):
    """On one process: gradients reduced in buckets, and weights that are gathered for a call and let go."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = wrap(gl.Sequential(gl.Linear(3, 2), gl.BatchNorm1d(2), Tanh()), (None, 3))
    x = draw(4, 3)
    plain = grads(copy.deepcopy(module)(x), x)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ddp = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(module))
        ddp(x).square().sum().backward()
        torch.testing.assert_close((x.grad,), plain)
        assert all(p.grad is not None for p in ddp.parameters())
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(grads(module(x), x), plain)
        optimizer = gl.torch.optim.SGD(module.parameters(), lr=1.0)
        module(x).square().sum().backward()
        optimizer.step()
        assert not torch.allclose(module(x), ddp(x))
        assert module.layer.state_dict()["0.weight"].shape == (2, 3)
    finally:
        dist.destroy_process_group()


def test_compiling_breaks_the_graph():
    module = wrap(Swish(), (None, 3))
    x = draw(2, 3)
    model = torch.nn.Sequential(torch.nn.ReLU(), module, torch.nn.ReLU())
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(grads(compiled(x), x), grads(model(x), x))
    torch._dynamo.reset()
    with pytest.raises(Exception, match="compile without fullgraph=True"):
        torch.compile(model, backend="eager", fullgraph=True)(x)


def test_derivatives_that_it_does_not_have():
    module = wrap(Swish(), (None, 3))
    x = draw(2, 3)
    (dx,) = torch.autograd.grad(x.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="Swish: a wrapped layer has no gradient of its gradient"):
        torch.autograd.grad(module(dx).sum(), x, create_graph=True)
    jvp = lambda x: torch.func.jvp(module, (x,), (x,))  # noqa: E731
    for transform in (torch.func.grad(lambda x: module(x).sum()), torch.func.vmap(module), jvp):
        with pytest.raises(RuntimeError, match="setup_context"):
            transform(x.detach())
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        module(forward_ad.make_dual(x.detach(), x.detach()))
    y = module(x)
    with pytest.raises(NotImplementedError, match="no batched and no dual gradients"):
        torch.autograd.grad(y, x, torch.ones(3, 2, 3), is_grads_batched=True, retain_graph=True)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no batched and no dual gradients"):
        torch.autograd.grad(y, x, forward_ad.make_dual(torch.ones(2, 3), torch.ones(2, 3)))


def test_lazily_negated_tensors():
    """Their memory holds −x."""
    module, x = wrap(Swish(), (None, 3)), draw(2, 3).detach()
    negated = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(module(negated), module(x))
    leaf = x.clone().requires_grad_()
    found = [torch.autograd.grad(module(leaf), leaf, dy) for dy in (negated, x)]
    torch.testing.assert_close(*found)


def test_errors():
    sparse = torch.ones(2, 3).to_sparse()
    with pytest.raises(TypeError, match=r"Swish: the rule is dense tensors .* got a sparse_coo tensor on cpu"):
        wrap(Swish(), (None, 3))(sparse)
    with pytest.raises(TypeError, match=r"wrap: layer: the rule is a gpulayers Layer; got Linear"):
        wrap(torch.nn.Linear(2, 2))
    with pytest.raises(RuntimeError, match=r"Swish is not built"):
        wrap(Swish())
    module = wrap(gl.Sequential(gl.Linear(3, 2)))
    with pytest.raises(
        TypeError, match=r"Sequential: the rule is dense tensors on the CPU or a CUDA device; got ndarray"
    ):
        module(np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"got a strided tensor on meta"):
        module.to("meta")(torch.ones(2, 3))
    module = wrap(gl.Sequential(gl.Linear(3, 2)))
    with pytest.raises(RuntimeError, match=r"0.Linear: x: the rule is"):
        module(torch.ones(2, 4))
    assert module(torch.ones(2, 3)).shape == (2, 2)  # nothing is left behind
    assert not any(layer._waiting.frames for layer in module.layer.layers())

    class Wrong(Swish):
        def backward(self, dy):
            self.beta.grad = dy
            return dy

    with pytest.raises(RuntimeError, match=r"beta: grad: the rule is grad.shape = \[\]; got \[2, 3\]"):
        wrap(Wrong(), (None, 3))(draw(2, 3)).sum().backward()

    class Replaces(Swish):
        def forward(self, x):
            self.beta.data = self.beta.data * 2
            return super().forward(x)

    with pytest.raises(RuntimeError, match=r"beta: forward replaces the data of a trainable weight"):
        wrap(Replaces(), (None, 3))(draw(2, 3))

    class Punished(gl.Layer):
        def __init__(self):
            self.w = self.add_weight("w", (3,), regularizer=gl.L2(0.1))

    with pytest.warns(UserWarning, match=r"Punished.w: its regularizer and constraint act in fit alone"):
        wrap(Punished())


def test_what_is_frozen_stays_so():
    layer = gl.Sequential(gl.Linear(3, 3), gl.BatchNorm1d(3), gl.BatchNorm1d(3))
    layer[0].trainable = layer[1].trainable = False
    layer[2].eval()
    module = wrap(layer)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == ["2.weight", "2.bias"]
    assert len(list(module.parameters())) == 6 and module.training
    before = {n: b.clone() for n, b in module.named_buffers()}
    module(draw(5, 3)).sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in module.named_buffers())
    module.train()(draw(5, 3))  # sets all parts, as torch's own does; what is frozen stays so
    changed = [n for n, b in module.named_buffers() if not torch.equal(b, before[n])]
    assert changed == ["2.running_mean", "2.running_var", "2.num_batches_tracked"]
