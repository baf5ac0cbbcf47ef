"""A weight is an array that knows it is one: arithmetic, writing, sharing, and where weights and layers are found."""

import collections
import copy
import operator
import pickle

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers._weight import casts_kept

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((4, 3)).astype(np.float32)


def weight(*shape, dtype=np.float32):
    return gl.Weight("w", RANDOM.standard_normal(shape).astype(dtype) + dtype(3))


BINARY = ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "eq", "ne", "lt", "le", "gt", "ge"]


@pytest.mark.parametrize("name", BINARY)
def test_arithmetic_is_that_of_the_array(name):
    w, f = weight(3), getattr(operator, name)
    for other in (2.0, abs(X), np.float32(2), weight(3)):
        plain = other.data if isinstance(other, gl.Weight) else other
        for got, want in ((f(w, other), f(w.data, plain)), (f(other, w), f(plain, w.data))):
            assert type(got) is type(want) and np.array_equal(got, want, equal_nan=True)


def test_other_operators():
    w, n = weight(3, 3), gl.Weight("n", np.arange(3))
    assert np.array_equal(X @ w, X @ w.data) and np.array_equal(w @ X.T, w.data @ X.T)
    assert np.array_equal(-w, -w.data) and np.array_equal(abs(w - 4), abs(w.data - 4))
    assert (
        np.array_equal(n << 1, n.data << 1)
        and np.array_equal(~n, ~n.data)
        and np.array_equal(n & 1 | 2, n.data & 1 | 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(divmod(w, 2), divmod(w.data, 2)))
    assert len(w) == 3 and [row.sum() for row in w] == [row.sum() for row in w.data] and w[0, 0] in w
    scalar = gl.Weight("s", np.array(2.5, np.float32))
    assert float(scalar) == 2.5 and int(scalar) == 2 and bool(scalar) and f"{scalar:.2f}" == "2.50"
    assert [7, 8, 9][gl.Weight("i", np.array(1))] == 8
    with pytest.raises(ValueError, match="truth value of an array"):
        bool(w)


def test_methods_and_functions_are_the_arrays():
    w = weight(2, 3)
    assert w.T.shape == (3, 2) and w.T.base is not None and w.reshape(-1).shape == (6,) and w.size == 6 and w.ndim == 2
    assert w.sum() == w.data.sum() and np.array_equal(w.mean(0), w.data.mean(0)) and w.nbytes == 24
    assert type(w.copy()) is np.ndarray and w.astype(np.float64).dtype == np.float64 and w.tolist() == w.data.tolist()
    assert np.asarray(w) is w.data and np.array(w) is not w.data
    assert np.array_equal(np.concatenate([w, X]), np.concatenate([w.data, X]))
    assert np.array_equal(np.einsum("ij,kj->ik", w, X), np.einsum("ij,kj->ik", w.data, X))
    assert np.add.reduce(w).shape == (3,) and np.array_equal(np.exp(w), np.exp(w.data))
    y = np.ones_like(w)
    y += w
    assert type(y) is np.ndarray and np.array_equal(y, 1 + w.data)
    assert {w: 1}[w] == 1 and copy.copy(w).data is w.data and copy.deepcopy(w).data is not w.data
    assert np.array_equal(pickle.loads(pickle.dumps(w)).data, w.data)
    with pytest.raises(AttributeError, match="nothing"):
        w.nothing  # noqa: B018
    with pytest.raises(TypeError, match="expected a NumPy, CuPy or torch array"):
        gl.Weight("w", "text")
    assert gl.Weight("w", [1, 2]).dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, gl.arrays.bfloat16], ids=str)
def test_writing_is_in_place(dtype):
    dtype = np.dtype(dtype)
    w = gl.Weight("w", np.arange(6).reshape(2, 3).astype(dtype))
    data, seen = w.data, w
    w *= 2
    w += X[:2].astype(dtype)
    w[0] = 7
    w[w > 100] = 0
    np.multiply(w, 2, out=w)
    w.data[1, 1] = 5
    w.T[2, 1] = 9
    assert w is seen and w.data is data and w.dtype == dtype
    assert w[0].tolist() == [14, 14, 14] and data[1, 1] == 5 and data[1, 2] == 9
    with pytest.raises(ValueError, match=r"w: the rule is shape = \[2, 3\]; got \[4, 2, 3\]"):
        w += np.ones((4, 2, 3), dtype)
    with pytest.raises(TypeError, match=r"w: the rule is numbers that .* holds; got complex128\[2, 3\]"):
        w.assign(np.ones((2, 3), complex))
    counter = gl.Weight("n", np.array(3))
    counter += 1
    with pytest.raises(TypeError, match=r"n: the rule is integers, as its dtype is int64; got float64"):
        counter += 0.5
    assert counter.data == 4
    frozen = np.ones(3, np.float32)
    frozen.flags.writeable = False
    fixed = gl.Weight("f", frozen)
    fixed *= 3
    assert fixed.tolist() == [3, 3, 3] and frozen.tolist() == [1, 1, 1]


def test_weights_on_torch_tensors():
    """Where a GPU is there but no CuPy, weights are torch tensors."""
    torch = pytest.importorskip("torch")
    w, x = gl.Weight("w", torch.arange(3.0)), torch.ones(2, 3)
    data = w.data
    for y in (x + w, w + x, x * w - w, w @ x.T, torch.exp(w), -w, w == w, w.sum(), w.reshape(3, 1)):
        assert type(y) is torch.Tensor
    w *= 2
    w[0] = 5.0
    w.assign(np.array([5.0, 2.0, 7.0]))
    assert w.data is data and data.tolist() == [5, 2, 7] and w.shape == (3,) and w.dtype == np.float32
    assert gl.Weight("n", np.ones(3, np.float32)).assign(torch.arange(3.0)).tolist() == [0, 1, 2]


@gl.register
class Holder(gl.Layer):
    """y = w x"""

    def __init__(self):
        self.w = self.add_weight("w", (3,), "ones")
        self.v = self.add_weight("v", (3,), "ones")

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        return x * self.w


def test_assigning_to_a_layers_weight_writes_into_it():
    layer = gl.Linear(3, 2)
    w, data = layer.weight, layer.weight.data
    layer.weight *= 0.5
    layer.weight -= 1
    layer.weight = np.arange(6).reshape(2, 3)
    layer.weight = layer.weight * 2
    layer.bias = [1.0, 2.0]
    assert layer.weight is w and w.data is data and w.dtype == np.float32
    assert data.tolist() == [[0, 2, 4], [6, 8, 10]] and layer(X)[0, 1] == pytest.approx(float(X[0] @ data[1] + 2))
    for wrong, error, text in (
        (np.ones(3), ValueError, r"Linear.weight: the rule is shape = \[2, 3\]; got \[3\]"),
        (0.0, ValueError, r"Linear.weight: the rule is shape = \[2, 3\]; got \[\]"),
        (np.ones((2, 3), complex), TypeError, r"Linear.weight: the rule is numbers that float32 holds; got complex128"),
        ("he", TypeError, r"Linear.weight: the rule is numbers"),
        (gl.Linear(2, 2).weight, ValueError, r"weight: the rule is a weight of shape \[2, 3\]; got Linear.weight"),
    ):
        with pytest.raises(error, match=text):
            layer.weight = wrong
    assert layer.weight is w and list(layer.state_dict()) == ["weight", "bias"]
    with pytest.raises(TypeError, match=r"Linear.bias: the rule is a Weight, as gl.Weight\('bias', …\).*plain array"):
        gl.Linear(3, 2, bias=False).bias = np.zeros(2)


def tied(bias=True):
    gl.random.seed(1)
    model = gl.Sequential(gl.Linear(3, 3), gl.Tanh(), gl.Linear(3, 3, bias=bias))
    model[2].weight = model[0].weight
    return model


def test_shared_weights_are_known_once(tmp_path):
    model = tied()
    assert model[2].weight is model[0].weight and list(model.named_weights()) == ["0.weight", "0.bias", "2.bias"]
    assert model.ties() == {"2.weight": "0.weight"} and len(model.trainable_weights) == 3
    lines = model.summary((None, 3)).splitlines()
    assert " 48 " in Stack().summary((None, 3)).splitlines()[2], "layers in lists are part of their layer's line"
    assert "15 parameters (15 trainable), 60 B" in lines[-1] and " 12 " in lines[2] and " 3 " in lines[4]
    y = model(X)
    model.backward(np.ones_like(y))
    shared = model[0].weight.grad.copy()
    model.zero_grad()
    apart = gl.Sequential(gl.Linear(3, 3), gl.Tanh(), gl.Linear(3, 3))
    apart.load_state_dict(model.state_dict(ties=True))
    apart.backward(np.ones_like(apart(X)))
    np.testing.assert_allclose(shared, apart[0].weight.grad + apart[2].weight.grad, rtol=1e-5)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    gl.save(model, tmp_path / "model")
    for other in (*copies, gl.load(tmp_path / "model")):
        assert other[2].weight is other[0].weight is not model[0].weight and np.array_equal(other(X), y)
        other.to("float64")
        assert other[2].weight is other[0].weight and other[2].weight.dtype == np.float64


def test_shared_weights_train_as_one():
    model, target = tied(), np.zeros((4, 3), np.float32)
    model[0].weight.regularizer = gl.L2(0.5)
    plain = float(gl.MSELoss()(model.predict(X), target))
    before = model[0].weight.data.copy()
    history = model.fit(X, target, loss=gl.MSELoss(), optimizer=gl.SGD(0.0), progress=False)
    assert history["loss"][0] == pytest.approx(plain + 0.5 * (before**2).sum(), rel=1e-5)  # the penalty counts once
    model.fit(X, target, loss=gl.MSELoss(), optimizer="adamw", epochs=2, progress=False)
    assert model[2].weight is model[0].weight and not np.array_equal(model[0].weight.data, before)


def test_shared_weights_to_and_from_torch():
    torch = pytest.importorskip("torch")
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
    module[2].weight = module[0].weight
    model = tied()
    model.load_state_dict(module.state_dict())  # has both names
    np.testing.assert_allclose(model(X), module(torch.tensor(X)).detach().numpy(), rtol=1e-5, atol=1e-6)
    module.load_state_dict({k: torch.tensor(v) for k, v in model.state_dict(ties=True).items()})
    before, state = model.state_dict(), dict(module.state_dict())
    del state["0.weight"]  # one of its names is enough
    model.load_state_dict(state)
    with pytest.raises(ValueError, match=r"equal values for a shared weight; 2.weight is not 0.weight"):
        model.load_state_dict(module.state_dict() | {"2.weight": torch.zeros(3, 3)})
    assert all(np.array_equal(before[k], v) for k, v in model.state_dict().items())


def test_a_weight_that_is_gone_is_gone(tmp_path):
    model = gl.Sequential(gl.Linear(3, 3), gl.BatchNorm1d(3), gl.Linear(3, 2, bias=False))
    model(X)
    model[0].bias = None
    del model[1].weight
    model[1].weight = None
    model[2].bias = gl.Weight("bias", np.ones(2, np.float32))
    assert (
        "0.bias" not in model.state_dict() and "1.weight" not in model.state_dict() and "2.bias" in model.state_dict()
    )
    y = model.predict(X)
    gl.save(model, tmp_path / "model")
    again = gl.load(tmp_path / "model")
    assert (
        again[0].bias is None
        and np.array_equal(again.predict(X), y)
        and list(again.state_dict()) == list(model.state_dict())
    )


@gl.register
class Stack(gl.Layer):
    """x through the layers in lists, dicts and tuples, times the weights in them."""

    def __init__(self, depth=2):
        self.blocks = [gl.Linear(3, 3) for _ in range(depth)]
        self.heads = {"a": gl.Tanh(), "b": (gl.Linear(3, 3), [gl.LayerNorm(3)])}
        self.scales = [gl.Weight("scale", np.full(3, 2.0, np.float32)), self.add_weight("extra", (3,), "ones")]
        self.queue = collections.deque()

    def chain(self):
        return [*self.blocks, self.heads["a"], self.heads["b"][0], self.heads["b"][1][0], *self.queue]

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        for layer in self.chain():
            x = layer(x)
        for scale in self.scales:
            x = x * scale
        return x

    def backward(self, dy):
        for scale in self.scales:
            dy = dy * scale
        for layer in reversed(self.chain()):
            dy = layer.backward(dy)
        return dy


NAMES = ["extra", "scales.0", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "blocks.1.bias"]
NAMES += ["heads.b.0.weight", "heads.b.0.bias", "heads.b.1.0.weight", "heads.b.1.0.bias"]


def test_layers_and_weights_in_lists_dicts_and_tuples_are_found(tmp_path):
    stack = Stack()
    assert list(stack.named_weights()) == NAMES
    assert list(stack.children()) == ["blocks.0", "blocks.1", "heads.a", "heads.b.0", "heads.b.1.0"]
    before = stack.blocks[1].weight.data.copy()
    stack.fit(X, X, loss=gl.MSELoss(), optimizer=gl.SGD(0.1), progress=False)
    assert not np.array_equal(stack.blocks[1].weight.data, before)
    # Lists may change at any time.
    stack.blocks.append(gl.Linear(3, 3))
    stack.queue.append(gl.Linear(3, 3, bias=False))
    del stack.blocks[0], stack.scales[0]
    stack.heads["a"] = gl.ReLU()
    stack.scales[0] *= 3
    assert [n for n in stack.named_weights() if "blocks" not in n] == ["extra", *NAMES[6:], "queue.0.weight"]
    stack.scales.clear()
    assert "extra" not in stack.named_weights()
    y = stack.predict(X)
    stack.queue = list(stack.queue)
    gl.save(stack, tmp_path / "model")
    again = gl.load(tmp_path / "model")
    assert np.array_equal(again.predict(X), y) and isinstance(again.heads["a"], gl.ReLU)
    assert list(again.state_dict()) == list(stack.state_dict())


def test_what_cannot_be_found_is_refused():
    layer = Holder()
    with pytest.raises(
        TypeError, match=r"Holder.parts: the rule is layers and weights in lists, tuples or dicts; got a set"
    ):
        layer.parts = {gl.ReLU()}
    layer.bag = set()
    layer.bag.add(gl.ReLU())
    with pytest.raises(TypeError, match="bag: the rule is layers and weights in lists"):
        layer.named_weights()
    with pytest.raises(TypeError, match=r"Holder.layers: the rule is a name that no method of Layer has, as blocks"):
        layer.layers = [gl.ReLU()]
    twice = Holder()
    twice.parts = {"0": gl.ReLU(), 0: gl.Tanh()}
    with pytest.raises(ValueError, match=r"Holder: the rule is one name for each layer and weight; got two 'parts.0'"):
        twice.children()
    clash = Holder()
    clash.w, clash.u = gl.Weight("w", np.ones(3)), clash.w
    assert list(clash.named_weights()) == ["w", "v", "u"]
    other = gl.Sequential(gl.ReLU())
    other.add_weight("w", (2,)), setattr(other, "w", gl.Weight("w", np.ones(3)))
    with pytest.raises(ValueError, match=r"Sequential: two weights are named 'w'"):
        other.state_dict()


def test_a_sublayer_that_is_gone_is_gone():
    @gl.register
    class Triple(gl.Layer):
        def __init__(self):
            self.a, self.b, self.c = gl.Linear(3, 3), gl.Linear(3, 3), gl.Linear(3, 3)

    block = Triple()
    assert len(block.weights) == 6
    del block.b
    assert len(block.weights) == 4
    block.a = None
    assert [name.partition(".")[0] for name in block.named_weights()] == ["c", "c"]
    block.c = gl.Linear(3, 5)
    assert {n: w.shape for n, w in block.named_weights().items()} == {"c.weight": (5, 3), "c.bias": (5,)}
    model = gl.Sequential(gl.Linear(3, 3), gl.ReLU(), gl.Linear(3, 2))
    model[2] = gl.Linear(3, 4)
    del model[1]
    model.append(gl.Softmax())
    model.insert(1, gl.Tanh())
    assert model(X).shape == (4, 4) and [layer.name for layer in model] == [
        "0.Linear",
        "1.Tanh",
        "2.Linear",
        "3.Softmax",
    ]
    with pytest.raises(TypeError, match="Sequential: argument 0: the rule is a Layer; got 'relu'"):
        model[0] = "relu"


def test_a_child_may_know_its_parent(tmp_path):
    model = gl.Sequential(Holder(), gl.Linear(3, 3))
    model[0].parent = model
    model[0].neighbours = [model[1], model]
    assert list(model.named_weights()) == ["0.w", "0.v", "0.neighbours.0.weight", "0.neighbours.0.bias"]
    assert len(list(model.layers())) == 3
    y = model.predict(X)
    gl.save(model, tmp_path / "model")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), gl.load(tmp_path / "model")):
        assert other[0].parent is other and np.array_equal(other.predict(X), y)


def test_a_shallow_copy_shares_weights_and_nothing_else():
    model = gl.Sequential(gl.Linear(3, 3), gl.Tanh())
    y = model(X)
    other = copy.copy(model)
    assert other[0] is model[0] and not other._waiting.frames
    other.append(gl.Linear(3, 2))
    linear = copy.copy(model[0])
    linear.bias = None
    assert list(linear.state_dict()) == ["weight"] and list(model.state_dict()) == ["0.weight", "0.bias"]
    assert np.array_equal(model(X), y) and other(X).shape == (4, 2)


def test_casts_follow_every_write():
    """A weight in 16 bits is what the weight is, however it was written."""
    layer, x = gl.Linear(3, 3, bias=False), np.eye(3, dtype=np.float16)
    for write in (
        lambda w: w.data.__setitem__(..., 1.5),
        lambda w: w.data.fill(2.0),
        lambda w: np.copyto(w.data, 2.5),
        lambda w: w.T.fill(3.0),
        lambda w: w.__setitem__(0, 4.0),
    ):
        layer(x), write(layer.weight)
        assert np.array_equal(layer(x), layer.weight.data.T.astype(np.float16))
    kept = {}
    with casts_kept(kept):
        assert layer.weight.as_dtype(x.dtype) is layer.weight.as_dtype(x.dtype)
        layer.weight.data = layer.weight.data * 0 + 7
        assert (layer.weight.as_dtype(x.dtype) == 7).all()
    layer.weight.data.fill(1.0)
    predicted = layer.predict(X, precision="float16")
    layer.weight.data.fill(2.0)
    assert np.array_equal(layer.predict(X, precision="float16"), 2 * predicted)
