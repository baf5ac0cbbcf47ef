"""The persistent loop of recurrent layers, emulated: both ways to wait, and seeded faults in them."""

import shutil

import numpy as np
import pytest
from gpulayers.kernels.cuda import _launch
from gpulayers.kernels.cuda import recurrent as kernels
from test_recurrent import call

from gpulayers import arrays, dispatch
from gpulayers.ops.recurrent import recurrent
from gpulayers.testing.arena import arena, has_gpu
from gpulayers.testing.audit_op import _cuda_launches
from gpulayers.testing.emulator import emulating
from gpulayers.testing.tolerance import excess

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")


def results(inputs, backend, options, dtype, moved=0):
    """Outputs and gradients, from the same dys in any dtype; or from dys that are a rounding away."""
    given = [a if a is None or a.dtype.kind == "i" else a.astype(dtype) for a in inputs]
    needs = tuple(n for n, a in zip(recurrent.inputs, given) if a is not None and n != "lengths")
    with arena(backend) as room, dispatch.only(backend):
        outputs, recorded = dispatch.forward(recurrent, room.put(given), needs, options)
        dys = [np.random.default_rng(i).standard_normal(y.shape).astype(np.float16) for i, y in enumerate(outputs)]
        up = [1 + moved * np.random.default_rng(moved).choice([-1, 1], dy.shape) * 2.0**-24 for dy in dys]
        grads = recorded.backward(*[room.put((dy * u).astype(arrays.dtype(dtype))) for dy, u in zip(dys, up)])
        return [room.get(a) for a in (*outputs, *grads) if a is not None]


def held(case, dtype, by_data, monkeypatch, **options):
    """The loop's results, which are the definition's."""
    monkeypatch.setattr(kernels, "BY_DATA", by_data)
    options |= {"mode": case[0]}
    inputs = [a if a is None or a.dtype.kind == "i" else a.astype(dtype).astype(np.float64) for a in call(*case)]
    got = results(inputs, "cuda", options, dtype)
    truth, plain = (results(inputs, "definition", options, d) for d in (np.float64, dtype))
    others = [results(inputs, "definition", options, dtype, moved) for moved in (1, 2, 3)]
    for mine, true, rough, *moved in zip(got, truth, plain, *others, strict=True):
        if (wrong := excess(mine, true, rough.astype(mine.dtype), moved)) is not None:
            raise AssertionError(wrong)
    return got


CASES = [
    (("lstm", 3, 17, 4, 0, True, True), "float32", {}),
    (("lstm", 2, 2, 8, 0, True, False), "float16", {"reverse": True}),
    (("gru", 2, 1, 13, 0, True, True), "bfloat16", {"reverse": True}),
    (("rnn_tanh", 2, 1, 20, 0, False, False), "float32", {}),
    (("rnn_relu", 1, 3, 3, 0, False, True), "float16", {}),
    (("rnn_tanh", 1, 1, 50, 0, False, False), "float16", {}),  # more units than a block takes at once, by one
]


@pytest.mark.parametrize("case, dtype, options", CASES, ids=str)
def test_both_ways_to_wait(case, dtype, options, monkeypatch):
    """Blocks of several units, of which the last has fewer; more than one tile of sequences. The same bits."""
    both = [held(case, arrays.dtype(dtype), by_data, monkeypatch, **options) for by_data in (False, True)]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(*both, strict=True))


def test_all_ones_are_a_number_like_others(monkeypatch):
    """What by-data waiting writes into unwritten memory is a NaN that a user's h0 may hold; what is computed never is it."""
    monkeypatch.setattr(kernels, "BY_DATA", True)
    inputs = [None if a is None else a.astype(np.float32) for a in call("rnn_tanh", 2, 1, 3)]
    inputs[2].view(np.uint32)[:] = 0xFFFFFFFF
    with arena("cuda") as room, dispatch.only("cuda"):
        y, _ = recurrent(*room.put(inputs), mode="rnn_tanh")
        assert np.isnan(room.get(y)).all()


@pytest.mark.skipif(has_gpu(), reason="a GPU's multiprocessors are as many as it has")
def test_blocks_follow_the_multiprocessors(monkeypatch):
    """A large GPU has a block for each unit; where all but one are to be left free, one block has all units."""
    monkeypatch.setattr(_launch, "EMULATED_BLOCKS", 132)
    with emulating() as session:
        held(("rnn_tanh", 2, 1, 6, 0, False, False), np.dtype(np.float32), True, monkeypatch)
        with dispatch.sms(reserve=131):
            held(("rnn_tanh", 2, 1, 6, 0, False, False), np.dtype(np.float32), True, monkeypatch)
    assert [each.grid[0] for each in session.launches if each.kernel == "recurrent_forward_float32"] == [6, 1]


FAULTS = {
    "no barrier": (False, "if (!by_data && step + 1 < s.steps) grid_barrier(arrived, phase);", ""),
    "no fence": (False, "__threadfence();", ""),
    "reads without waiting": (True, "if (wait)", "if (false)"),
    "plain stores": (True, "if (by_data) store_strong(p, v == v ? x : from_acc<T>(__uint_as_float(0x7fc00000)));\n    else", ""),
    "parts written too early": (True, "__syncthreads();  // the next tile", "//"),
}  # fmt: skip


@pytest.mark.skipif(has_gpu(), reason="a GPU would wait for ever")
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name, monkeypatch):
    by_data, old, new = FAULTS[name]
    text = _launch.source("recurrent")
    assert text.count(old) == 1
    changed = "#define ONLY float32\n" + text.replace(old, new)
    monkeypatch.setattr(_launch, "source", lambda family: changed)
    with pytest.raises((RuntimeError, AssertionError)):
        held(("lstm", 3, 18, 24, 0, True, False), np.dtype(np.float32), by_data, monkeypatch)


def test_what_does_not_fit_is_refused():
    """By the shared memory of the multiprocessors at hand."""
    x, weight, h0, *_ = (arrays.spec(np.zeros(s, np.float16)) for s in ((2, 1, 4 * 2048), (4 * 2048, 2048), (1, 2048)))
    with emulating(), arena("cuda"):
        assert kernels.recurrent_refuses(x, weight, h0, h0, mode="lstm") == kernels.REFUSALS["shared"]
        case = [None if a is None else a.astype(np.float32) for a in call("lstm", 1, 1, 128, 0, False)]
        assert dispatch.explain(recurrent, *case, mode="lstm")[0] == "cuda"
        with dispatch.sms(reserve=2), pytest.raises(dispatch.Refused, match="do not fit"), dispatch.only("cuda"):
            dispatch.explain(recurrent, *case, mode="lstm")
        wide = x._replace(shape=(2, 65, 4 * 8)), weight._replace(shape=(32, 8)), h0
        assert kernels.recurrent_refuses(*wide, mode="lstm") == kernels.REFUSALS["batch"]


def test_an_audit_sees_both_loops():
    """With the weights that a block keeps as its dynamic shared memory."""
    shapes = [arrays.Spec(s, arrays.float16) for s in ((2, 1, 36), (36, 12), (1, 12))]
    found = _cuda_launches(recurrent, shapes, ("x", "weight"), {"mode": "gru"})
    shared = {name: bytes for (_, name), (_, bytes) in found.items()}
    assert shared["recurrent_forward_float16"] == kernels.slice_bytes(3 * 4, 12, 2)
    assert (
        shared["recurrent_backward_float16"] == kernels.slice_bytes(4, 36, 2) and "recurrent_weights_float16" in shared
    )
