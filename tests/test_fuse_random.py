"""Fused layers that draw: their kernels yield the random words that the array code does, forward and backward."""

import math

import numpy as np
import pytest
from check_fuse import wide
from fused_layers import Masked
from test_fuse import arrays_for, cache, module_of, triton  # noqa: F401

import gpulayers as gl
from gpulayers import dispatch
from gpulayers.arrays import Spec, bfloat16, int64
from gpulayers.export.recording import check_replay, record
from gpulayers.fusing import by_hand, fuse, fusion
from gpulayers.ops._random import normals, random_bits
from gpulayers.testing import audit_op, check_layer, check_op, cupy_like
from gpulayers.testing.interpreter import interpreting


@gl.register
class Dropped(gl.Layer):
    """gl.Dropout inside a layer of one's own, behind a softmax."""

    def __init__(self):
        self.drop = gl.Dropout(0.25)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        e = np.exp(x - x.max(-1, keepdims=True))
        p = e / e.sum(-1, keepdims=True)
        self.save(p)
        return self.drop(p)

    def backward(self, dy):
        (p,) = self.saved
        g = self.drop.backward(dy) * p
        return g - p * g.sum(-1, keepdims=True)


class Noisy(gl.Layer):
    """Several draws: of normal numbers, a mask for each row, for each column, and for all; one that nobody uses."""

    def build(self, input_shape):
        self.gain = self.add_weight("gain", input_shape[-1:], init=0.5)

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        noise = gl.random.normal(x.shape, like=x)
        gl.random.draw()
        rows = gl.random.bits((*x.shape[:-1], 1), like=x) > 2**31
        columns = gl.random.uniform(x.shape[-1:], like=x)
        one = gl.random.uniform((), like=x)
        self.save(x, noise, rows, columns, one)
        return (x * self.gain + noise * one) * rows * columns

    def backward(self, dy):
        x, noise, rows, columns, one = self.saved
        g = dy * rows * columns
        axes = tuple(range(x.ndim - 1))
        self.gain.grad += (g * x).sum(axes) * one
        return g * self.gain + noise.mean(-1, keepdims=True)


class Late(Masked):
    """Its backward draws for itself."""

    def backward(self, dy):
        return dy * gl.random.uniform(dy.shape, like=dy)


class OfNumPy(Masked):
    """Its numbers come from a generator of NumPy's, whose bits no kernel has."""

    def forward(self, x):
        keep = gl.random.generator().random(x.shape) >= self.p
        self.save(keep)
        return np.where(keep, x, 0) * 2

    def backward(self, dy):
        return np.where(self.saved[0], dy, 0) * 2


def seeds_for(made) -> list[np.ndarray]:
    return [np.array([2**62 - 99 * i, 3 * i], np.int64) for i in range(len(made.draws))]


def calls_of(layer: gl.Layer, x: np.ndarray, dy: np.ndarray) -> tuple:
    layer.ensure_built((None, *x.shape[1:]))
    gl.random.seed(7)
    return layer(x), layer.backward(dy), gl.random.get_state()


# --- the numbers -----------------------------------------------------------------------------------------------------


def test_numbers_are_the_librarys_words():
    drawn = np.array([5, 9])
    words = random_bits(drawn, 6).reshape(2, 3)
    assert np.array_equal(gl.random.bits((2, 3), drawn=drawn), words)
    uniform = gl.random.uniform((2, 3), drawn=drawn)
    assert uniform.dtype == np.float32 and np.array_equal(uniform * 2**24, words >> 8)
    gl.random.seed(3)
    assert gl.random.normal((2, 3), like=np.zeros(0, np.float16)).dtype == np.float32
    assert gl.random.get_state() == {"seed": 3, "count": 1}


@pytest.mark.parametrize("numbers", [gl.random.bits, gl.random.uniform, gl.random.normal])
def test_numbers_on_cupys_terms(numbers):
    drawn = np.array([2**60 + 7, 3])
    with cupy_like.room() as room:
        found = room.get(numbers((3, 5), drawn=room.put([drawn])[0]))
    assert np.array_equal(found, numbers((3, 5), drawn=drawn))


def test_normal_numbers_are_normal():
    """Each is where the normal distribution has its 24 bits, tails included; and together they are distributed so."""
    ranks = np.array([0, 1, 2, 5, 99, 2**12, 2**20, 2**23 - 1, 2**23, 2**24 - 3, 2**24 - 1], np.uint32)
    found = normals(ranks << 8).astype(np.float64)
    wanted = (2 * ranks.astype(np.float64) + 1) / 2**25
    below = np.vectorize(math.erfc)(-found / math.sqrt(2)) / 2
    density = np.exp(-(found**2) / 2) / math.sqrt(2 * math.pi)
    assert (np.abs(below - wanted) <= 4e-7 * np.maximum(1, np.abs(found)) * density + 1e-16).all()
    assert found[0] == -found[-1] and 5.3 < found[-1] < 5.5
    gl.random.seed(1)
    noise = np.sort(gl.random.normal((1 << 14,)))
    below = 0.5 * (1 + np.vectorize(math.erf)(noise / math.sqrt(2)))
    assert np.abs(below - (np.arange(noise.size) + 0.5) / noise.size).max() < 1.63 / math.sqrt(
        noise.size
    )  # Kolmogorov, 1 %


# --- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 8), (3, 7), (0, 4)])
@pytest.mark.parametrize("make", [Masked, Dropped, Noisy])
def test_kernels_draw_what_the_array_code_draws(make, shape):
    layer = make()
    made = fusion(layer, (None, *shape[1:]))
    dtypes = ["float32", "float16", "bfloat16"] if shape == (3, 7) else ["float32"]
    xs = [*arrays_for(layer, shape), *seeds_for(made)]
    assert check_op(made.op, *xs, backends=["definition", "triton"], dtypes=dtypes, dys=["dense"])
    if shape == (5, 8):
        with wide(walked=4):
            check_op(made.op, *xs, backends=["triton"], dtypes=dtypes, dys=["dense"])


@pytest.mark.parametrize("shape", [(4, 8), (3, 5)])
def test_equal_seeds_give_equal_bits(shape, triton):  # noqa: F811
    """In forward, in backward, and of gl.random's state after them."""
    x, dy = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    y, dx, state = calls_of(fuse(Masked(), (None, *shape[1:])), x, dy)
    assert [launch.kernel for launch in triton.launches] == ["masked_forward", "masked_backward"]
    with dispatch.policy(simulate=()), gl.only("definition"):
        own = calls_of(Masked(), x, dy)
    assert np.array_equal(y, own[0]) and np.array_equal(dx, own[1]) and state == own[2]
    assert (y == 0).any() and (y != 0).any() and np.array_equal(y == 0, dx == 0)


@pytest.mark.parametrize("axes", [(0, 1), (1,), (0,), (2, 3)])
def test_masks_along_some_axes(axes, triton):  # noqa: F811
    """A channel of an image, one for all images, a whole image, a pixel of all."""

    class Some(Masked):
        def forward(self, x):
            keep = gl.random.uniform([n if i in axes else 1 for i, n in enumerate(x.shape)], like=x) >= self.p
            self.save(keep)
            return np.where(keep, x, 0) * 2

        def backward(self, dy):
            return np.where(self.saved[0], dy, 0) * 2

    x, dy = np.random.default_rng(0).standard_normal((2, 3, 4, 2, 3)).astype(np.float32)
    found = calls_of(fuse(Some(), (None, *x.shape[1:])), x, dy)
    with dispatch.policy(simulate=()), gl.only("definition"):
        own = calls_of(Some(), x, dy)
    assert all(np.array_equal(a, b) for a, b in zip(found[:2], own[:2])) and len(triton.launches) == 2


def test_rows_of_a_slice(triton):  # noqa: F811
    """Words follow the number of an element, wherever it lies."""
    x = np.random.default_rng(0).standard_normal((6, 10)).astype(np.float32)[::2, :8]
    found = calls_of(fuse(Masked(), (None, 8)), x, x)
    with dispatch.policy(simulate=()), gl.only("definition"):
        own = calls_of(Masked(), x, x)
    assert all(np.array_equal(a, b) for a, b in zip(found[:2], own[:2])) and len(triton.launches) == 2


def test_tensors_are_refused():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="like: the rule is an array of NumPy's or CuPy's; got a tensor"):
        gl.random.normal((2,), like=torch.zeros(2))


def test_draws_that_nobody_uses_count(triton):  # noqa: F811
    layer = fuse(Noisy(), (None, 4))
    x = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    y, dx, state = calls_of(layer, x, x)
    with dispatch.policy(simulate=()), gl.only("definition"):
        own = calls_of(Noisy(), x, x)
    np.testing.assert_allclose(y, own[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, own[1], rtol=1e-5, atol=1e-6)
    assert state == own[2] and state["count"] == 5


def test_evaluation_draws_nothing(triton):  # noqa: F811
    layer = fuse(Masked(), (None, 4))
    layer.eval()
    before = gl.random.get_state()
    x = np.ones((2, 4), np.float32)
    assert np.array_equal(layer(x), x) and gl.random.get_state() == before


def test_explain_takes_a_layer_that_draws(triton):  # noqa: F811
    layer, before = fuse(Noisy(), (None, 4)), gl.random.get_state()
    found = gl.explain(layer, np.ones((2, 4), np.float32))
    assert [e.backend for e in found] == ["triton"] * 2 and gl.random.get_state() == before


def test_check_layer_passes_a_fused_layer_that_draws():
    check_layer(fuse(Dropped()), (None, 4), dtypes=["float32"], backends=["triton"])


def test_words_are_compared_as_integers():
    """A threshold that float32 has not, and one that no word reaches."""

    class Close(Masked):
        def forward(self, x):
            words = gl.random.bits(x.shape, like=x)
            self.save((words > 2**32 - 2) | (words < 77) | (words >= 2**32) | (words >= 2**31 + 1))
            return x * 1.0

        def backward(self, dy):
            return np.where(self.saved[0], dy, 0)

    text = fusion(Close(), (None, 4)).text
    assert "words > 4294967294" in text and "words < 77" in text and "words >= 2147483649" in text


@pytest.mark.parametrize(
    ("make", "said"),
    [(OfNumPy, "random_uniform has no counterpart"), (Late, "backward draws random numbers")],
)
def test_what_a_kernel_cannot_draw_is_drawn_between(make, said):
    """NumPy's numbers, and draws of backward's own."""
    layer, x = fuse(make(), (None, 4)), np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    assert said in fusion(layer, (None, 4)).text
    with interpreting() as session, dispatch.policy(simulate=("triton",), backends=("triton", "definition")):
        y, dx, state = calls_of(layer, x, x)
    own = calls_of(make(), x, x)
    assert session.launches and state == own[2]
    assert np.array_equal(y, own[0]) and np.allclose(dx, own[1], rtol=1e-6)


def test_machine_code():
    """Four neighbours share a counter, so that rows move 128 bits at a time."""
    op = fusion(Masked(), (None, 1024)).op
    for report in audit_op(op, Spec((512, 1024), bfloat16), Spec((2,), int64), archs=[90]):
        assert not report.spills


def test_calls_that_draw_are_taped(monkeypatch):
    torch = pytest.importorskip("torch")
    from gpulayers.testing.check_tape import check_tape
    from gpulayers.testing.null_driver import null_driver, same_memory

    if torch.cuda.is_available():
        pytest.skip("the null driver would stand for the GPU's own")
    monkeypatch.setattr(dispatch, "_plans", {})
    op = fusion(Masked(), (None, 8)).op
    with null_driver(compiled=False) as driver, same_memory() as memory:
        states = check_tape(driver, memory, op, [Spec((6, 8), bfloat16), Spec((2,), int64)], op.differentiable)
    assert states == {"forward": "taped", "backward": "taped"}


def test_the_file_by_hand_draws_by_itself(tmp_path):
    path = tmp_path / "masked_by_hand.py"
    path.write_text(by_hand(fusion(Masked(), (None, 8))))
    module = module_of(path)

    def masked(x, seed):
        return np.where(gl.random.uniform(x.shape, like=x, drawn=seed) >= 0.4, x, 0) * (1 / (1 - 0.4))

    def gradient(dy, seed):
        return masked(dy, seed), None

    op = gl.op(path.stem, masked, gradient, triton=(module.triton_forward, module.triton_backward))
    x = np.random.default_rng(0).standard_normal((6, 8))
    seed = np.array([77, 1])
    assert check_op(op, x, seed, backends=["triton"], dtypes=["float32", "bfloat16"], dys=["dense"]) == ["triton"]


def test_in_torch(triton):  # noqa: F811
    """Seeds come from torch's generator, for kernels and array code alike."""
    torch = pytest.importorskip("torch")
    gltorch = pytest.importorskip("gpulayers.torch")
    found = []
    for fused in (True, False):
        x = torch.linspace(-2, 2, 12).reshape(3, 4).requires_grad_()
        torch.manual_seed(3)
        with dispatch.policy(simulate=("triton",) if fused else ()), gl.only("triton" if fused else "definition"):
            y = gltorch.wrap(Masked(), (None, 4), fuse=fused)(x)
            y.square().sum().backward()
        found.append((y.detach(), x.grad, torch.rand(1)))
    assert len(triton.launches) == 2
    for a, b in zip(*found):
        assert torch.equal(a, b)


def test_recording_leaves_the_random_numbers_alone():
    """The first call of a fused layer may record it; the caller's draws are what they were without that."""
    gl.random.seed(5)
    fusion(Masked(), (None, 3))
    assert gl.random.get_state() == {"seed": 5, "count": 0}


@gl.register
class Always(gl.Layer):
    """Noise, in evaluation too."""

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        return x + gl.random.normal(x.shape, like=x)

    def backward(self, dy):
        return dy * 1.0


class Parity(Masked):
    """The lowest of the 24 bits of each number, which a rounding would change."""

    def forward(self, x):
        odd = gl.random.uniform(x.shape, like=x) * 2**24 % 2 == 1
        self.save(odd)
        return np.where(odd, x, 0)

    def backward(self, dy):
        return np.where(self.saved[0], dy, 0)


def test_no_bit_is_lost():
    """In the graph that exports write and in its replay, and in a kernel."""
    recording = record(Parity(), [(None, 500)])
    assert check_replay(Parity(), recording, [(None, 500)]) == 0
    made = fusion(Parity(), (None, 500))
    x, seed = np.random.default_rng(0).standard_normal((3, 500)).astype(np.float32), np.array([2**61 + 5, 2])
    with interpreting(), dispatch.policy(simulate=("triton",)), gl.only("triton"):
        y = made.op(x, seed)
    assert np.array_equal(y != 0, gl.random.bits(x.shape, drawn=seed) >> 8 & 1)


def test_an_export_draws_for_itself(tmp_path):
    pytest.importorskip("onnx")
    gl.Sequential(Always()).export(tmp_path / "noise.onnx", format="onnx", input_shapes=[(None, 4)])
    assert b"RandomUniformLike" in (tmp_path / "noise.onnx").read_bytes()
