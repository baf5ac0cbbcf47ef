"""The launch tape: what it gives the driver, when it is not played, and what becomes of it."""

import importlib
import os
import subprocess
import sys

import pytest
from own_kernels import double_kernel

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpulayers.bench.cases import uses  # noqa: E402

import gpulayers as gl  # noqa: E402
from gpulayers import arrays, dispatch, launch  # noqa: E402
from gpulayers.inventory import families  # noqa: E402
from gpulayers.ops.activation import relu  # noqa: E402
from gpulayers.ops.linear import linear  # noqa: E402
from gpulayers.ops.softmax import softmax  # noqa: E402
from gpulayers.testing.check_tape import check_tape, compare, replayed, tensor  # noqa: E402
from gpulayers.testing.null_driver import null_driver, same_memory, widths  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
X = torch.empty(8, 64, dtype=torch.bfloat16)


def plan_of(op, *xs, needs=(), **options):
    return dispatch.plan_for(op, xs, needs, options)[0]


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("arch, dtype", [(90, "bfloat16"), (80, "float32")])
def test_a_tape_gives_the_driver_what_triton_gives_it(family, arch, dtype, monkeypatch):
    """Every declared call, and every branch of every launcher: bytes, grids, allocations, results."""
    monkeypatch.setattr(dispatch, "_plans", {})
    bench = importlib.import_module(f"gpulayers.bench.{family}")
    with null_driver(arch, compiled=False) as driver, same_memory() as memory:
        for case in [*bench.cases(), *bench.audits()]:
            for needs in {(), case.wanted()}:
                inputs = uses._placed(case, arrays.dtype(dtype))
                states = check_tape(driver, memory, case.op, inputs, needs, **case.options)
                assert set(states.values()) == {"taped"}, (case.op.name, case.name)


def sliced(x):
    """``x``'s shape as a part of a wider array: rows that do not follow one another."""
    return x if x is None or not x.ndim else x.new_empty((*x.shape[:-1], x.shape[-1] + 16))[..., :-16]


def turned(x):
    """``x``'s shape with its axes in the opposite order in memory."""
    return x if x is None else x.new_empty(x.shape[::-1]).permute([*range(x.ndim)][::-1])


def expanded(x):
    return x if x is None else x.new_empty(()).expand(x.shape)


@pytest.mark.parametrize("family", sorted({*families()} - {"optim"}))
def test_every_op_is_taped_in_every_layout(family, monkeypatch):
    """Where launchers copy, they do it by a kernel of ours."""
    monkeypatch.setattr(dispatch, "_plans", {})
    bench = importlib.import_module(f"gpulayers.bench.{family}")
    first = {case.op.name: case for case in reversed(bench.cases())}
    with null_driver(compiled=False) as driver, same_memory() as memory:
        for case in first.values():
            given = [*map(tensor, uses._placed(case, arrays.dtype("bfloat16")))]
            for lay in (sliced, turned, expanded):
                xs = [*map(lay, given)]
                states = check_tape(driver, memory, case.op, xs, case.wanted(), lay, **case.options)
                assert set(states.values()) == {"taped"}, (case.op.name, lay.__name__, states)


def test_compiled_kernels_have_the_parameters_that_their_signatures_say(monkeypatch):
    """A binary's own list of its parameters against the widths that kernels which are not compiled stand for."""
    monkeypatch.setattr(dispatch, "_plans", {})
    x, w = torch.empty(128, 64, dtype=torch.bfloat16), torch.empty(128, 64, dtype=torch.bfloat16)
    with null_driver() as driver, same_memory() as memory:
        assert check_tape(driver, memory, relu, [X], ("x",)) == {"forward": "taped", "backward": "taped"}
        assert check_tape(driver, memory, linear, [x, w]) == {"forward": "taped"}
        plan = plan_of(linear, x, w)
        (kind,) = plan.run_forward.kinds.values()
        _, (noted, *_) = driver.noted(lambda: plan.run_forward(x, w))
        signature = kind.tapes[0].kept[0].src.signature.values()
        assert any("tensordesc" in str(k) for k in signature)
        assert len(noted.parameters) == sum(widths(tuple(signature))) + 16


def test_a_tape_that_differs_is_noticed(driver):
    """The comparison itself: a launcher that suddenly does something else."""
    with same_memory() as memory:
        check_tape(driver, memory, softmax, [X])
        plan = plan_of(softmax, X)
        other = plan_of(softmax, X, axis=0)
        plan.run_forward.run = other.run_forward.run
        with pytest.raises(AssertionError, match=r"differ:\n_softmax_forward_looped_kernel: kernel is"):
            compare(driver, memory, "softmax", plan.run_forward, X)


def test_python_plays_tapes_where_there_is_no_compiler(driver, monkeypatch):
    from gpulayers.launch import _tape

    monkeypatch.setattr(_tape, "player", lambda: _tape.PythonTape)
    x, w = torch.empty(128, 64, dtype=torch.bfloat16), torch.empty(128, 64, dtype=torch.bfloat16)
    with same_memory() as memory:
        assert set(check_tape(driver, memory, linear, [x, w], ("x", "weight")).values()) == {"taped"}
        plan = plan_of(linear, x, w, needs=("x", "weight"))
        assert all(type(t) is _tape.PythonTape for k in plan.run_forward.kinds.values() for t in k.tapes)


def test_a_compiler_that_fails_leaves_python_tapes(monkeypatch, driver, logged):
    from triton.runtime import build

    from gpulayers.launch import _tape

    def refuse(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(build, "compile_module_from_src", refuse)
    assert _tape.player.__wrapped__() is _tape.PythonTape
    said = "launch tapes are played by Python (RuntimeError: Failed to find C compiler)"
    assert [r.getMessage() for r in logged] == [said]


def test_the_c_type_is_built_without_triton_too(monkeypatch, driver, tmp_path):
    from gpulayers.launch import _build, _tape

    monkeypatch.setenv("GPULAYERS_CACHE", str(tmp_path))
    monkeypatch.setattr(_build.importlib.util, "find_spec", lambda name: None)
    kind = _tape.player.__wrapped__()
    assert kind is not _tape.PythonTape and kind.__name__ == "Tape" and len([*tmp_path.rglob("*.so")]) == 1


def test_the_first_call_is_launched_and_the_next_two_are_recorded(driver):
    states = []
    for _ in range(4):
        softmax(X)
        states.append(plan_of(softmax, X).run_forward.state())
    yet = "not taped yet: a call is recorded the second and the third time"
    assert states == [yet, yet, "taped", "taped"]
    assert driver.launches > 0


def test_tapes_can_be_off(driver):
    with launch.off():
        replayed(lambda: softmax(X))
        assert plan_of(softmax, X).run_forward.state() == f"not taped: {launch.UNTAPED['off']}"
    replayed(lambda: softmax(X))
    assert plan_of(softmax, X).run_forward.state() == "taped"


def test_the_environment_turns_tapes_off():
    code = "from gpulayers.launch import _settings; print(_settings.enabled)"
    for value, said in (("0", "False"), ("1", "True")):
        env = os.environ | {"GPULAYERS_TAPE": value}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said


def test_explain_says_whether_a_call_is_taped(driver):
    yet = "not taped yet: a call is recorded the second and the third time"
    assert gl.explain(relu, X, needs=["x"]).taped == {"forward": yet, "backward": yet}
    replayed(lambda: relu.record(X)[1].backward(X))
    assert gl.explain(relu, X, needs=["x"]).taped == {"forward": "taped", "backward": "taped"}
    assert gl.explain(relu, X).taped == {"forward": yet}
    with gl.only("definition"):
        assert gl.explain(relu, X).taped == {}


def test_what_a_launcher_must_not_do_is_named(driver):
    """Each reason of the list that a launcher on this machine can give rise to."""
    y = torch.empty_like(X)

    def allocates(x, *, empty):
        torch.zeros(3)
        return launching(x, empty=empty)

    def foreign(x, *, empty):
        double_kernel[(1,)](x, y, 512, BLOCK=512)
        return empty(x.shape, x.dtype)

    def part(x, *, empty):
        return empty((2, *x.shape), x.dtype)[1]

    def launching(x, *, empty):
        z = empty(x.shape, x.dtype)
        double_kernel[(1,)](x, z, 512, BLOCK=512)
        return z

    seen = {}
    for launcher in (launching, allocates, foreign, part):
        op = gl.op(launcher.__name__, lambda x: x, lambda dy: dy, triton=(launcher, lambda dy, *, empty: dy))
        replayed(lambda op=op: op(X))
        seen[launcher.__name__] = gl.explain(op, X).taped["forward"].removeprefix("not taped: ")
    assert seen["launching"] == "taped"
    assert seen["allocates"] == launch.UNTAPED["torch"].format("aten.zeros.default")
    assert seen["foreign"] == launch.UNTAPED["foreign"] and seen["part"] == launch.UNTAPED["view"]
