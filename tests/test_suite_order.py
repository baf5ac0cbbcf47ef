"""In which order a device's tests run, what they reach, and that the result says what never ran."""

import json
import pathlib
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

from gpulayers.bench.suite import device_tests, reach, recording
from gpulayers.bench.suite.order import Queue, in_turn
from gpulayers.bench.suite.outcomes import Outcome, read
from gpulayers.kernels.cuda import _launch
from gpulayers.kernels.triton import softmax as kernels
from triton.runtime.jit import JITFunction

from gpulayers.ops.activation import relu
from gpulayers.ops.softmax import softmax
from gpulayers.testing import arena, emulator, interpreter
from gpulayers.testing.check_op import check_op

pytestmark = pytest.mark.usefixtures("checkout")


def collected(*names, launches=True):
    """Tests of functions "f[case]" or "f[case, dtype]"."""
    for name in names:
        function, _, parameters = name.rstrip("]").partition("[")
        yield f"test_x.py::{name}", (f"test_x.py::{function}", *parameters.split(", ")[1:]), launches


def played(queue, reached=lambda name: ()):
    """The names of the tests in their order, each one's outcome told to the queue; what they reach in words."""
    order = []
    while (test := queue.next()) is not None:
        name = test.id.partition("::")[2]
        order.append(name)
        ended = Outcome(test.id, "passed", reached=tuple(reached(name)))
        queue.learn([Outcome(test.id, "started"), ended])
    return order


def test_every_function_and_dtype_before_any_second_case():
    names = ["a[0, f32]", "a[1, f32]", "a[0, f16]", "a[1, f16]", "a[2, f16]", "b[0]", "b[1]", "c"]
    order = played(Queue(in_turn(collected(*names))), lambda name: [name])
    assert order[:4] == ["a[0, f32]", "b[0]", "c", "a[0, f16]"]
    assert order[4:] == ["a[1, f32]", "b[1]", "a[1, f16]", "a[2, f16]"]


def test_files_take_turns():
    tests = [(f"{file}::{f}", (f"{file}::{f}",), True) for file in ("x", "y") for f in "ab"]
    queue = Queue(in_turn(tests))
    assert played(queue) == ["a", "a", "b", "b"]


def test_who_found_something_new_goes_on_first():
    cells = {"old": ["k"], "new[0]": ["m"], "new[1]": ["n"], "new[2]": ["n"]}
    names = ["old[0]", "old[1]", "old[2]", "new[0]", "new[1]", "new[2]"]
    queue = Queue(in_turn(collected(*names)))
    queue.learn([Outcome("test_x.py::none", "passed"), Outcome("test_x.py::new[0]", "again")])  # unknown; failed before
    order = played(queue, lambda name: cells.get(name, cells["old"]))
    assert order == ["old[0]", "old[1]", "new[1]", "new[2]", "old[2]", "new[0]"]
    order = played(Queue(in_turn(collected(*names))), lambda name: cells.get(name, cells["old"]))
    assert order == ["old[0]", "new[0]", "old[1]", "new[1]", "new[2]", "old[2]"]


def test_what_launches_nothing_comes_last():
    tests = [
        *collected("cannot[0]", "cannot[1]", launches=False),
        *collected("idle[0]", "idle[1]", "works[0]", "works[1]"),
    ]
    order = played(Queue(in_turn(tests)), lambda name: ["k"] if "works" in name else [])
    assert order == ["idle[0]", "works[0]", "works[1]", "cannot[0]", "cannot[1]", "idle[1]"]


def test_of_what_is_collected_here_every_group_comes_first(request):
    items = request.session.items[::5]
    tests = in_turn((i.nodeid, recording.group_of(i), recording.can_launch(i)) for i in items)
    can = [t for t in tests if t.launches]
    order, queue = [], Queue(tests)
    while (test := queue.next()) is not None:
        order.append(test)
        queue.learn([Outcome(test.id, "started")])
    assert len(order) == len(items) and set(order[: len(can)]) == {*can}
    groups = {t.group for t in can}
    assert {t.group for t in order[: len(groups)]} == groups


def test_groups_are_functions_with_op_and_dtype():
    parameters = {
        "op": softmax,
        "shape": (3, 4),
        "kind": np.dtype("float16"),
        "theirs": print,
        "last": True,
        "mode": "zeros",
    }
    item = SimpleNamespace(nodeid="t.py::test_f[softmax-a]", callspec=SimpleNamespace(params=parameters))
    assert recording.group_of(item) == ("t.py::test_f", "softmax", "float16")
    assert recording.group_of(SimpleNamespace(nodeid="t.py::test_g")) == ("t.py::test_g",)


def _helper():
    check_op(softmax, np.ones(3))


def _uses_a_helper():
    assert [_helper() for _ in range(2)]


def _says_where():
    _other("cuda")


def _uses_none():
    assert softmax.name and _other() is None


def _other(where=None): ...


def test_who_comes_to_a_device_says_so():
    assert all(recording.can_launch(SimpleNamespace(function=f)) for f in (_uses_a_helper, _says_where))
    assert not recording.can_launch(SimpleNamespace(function=_uses_none))


# --- kernels and dtypes ----------------------------------------------------------------------------------------------


def test_cells():
    assert reach.cells("triton", "_k_kernel", "float32 int64 float32") == ["triton _k_kernel float32"]
    assert reach.cells("triton", "_k_kernel", "float32 bfloat16") == ["triton _k_kernel bfloat16"]
    assert reach.cells("triton", "_k_kernel", "int64") == ["triton _k_kernel integers"]
    assert reach.cells("cuda", "layer_norm_forward_bfloat16_float32_packs", "bfloat16 float32") == [
        "cuda layer_norm_forward bfloat16"
    ]


def test_the_kernels_of_cuda_are_what_a_compiler_finds():
    stems = [p.stem for p in pathlib.Path(_launch.__file__).parent.glob("*.cu")]
    names = [n for stem in stems for n in emulator.kernel_names(_launch.source(stem))]
    assert {reach.cells("cuda", n, "float32")[0].split()[1] for n in names} == {*reach.kernels()["cuda"]}


def test_what_runs_is_among_the_kernels_there_are():
    watch = reach.Watch(gpu=False)
    earlier = {*interpreter.proven}
    with watch.one():
        check_op(softmax, np.ones((2, 3)), backends=("triton",), dtypes=["float32", "bfloat16"], dys=["dense"])
        check_op(relu, np.ones((2, 3)), backends=("cuda",), dtypes=["float16"], dys=["dense"])
    reached = watch.reached()
    assert reached == tuple(sorted([
        *(f"triton _softmax_{d}_kernel {t}" for d in ("forward", "backward") for t in ("float32", "bfloat16")),
        *(f"cuda relu_{d} float16" for d in ("forward", "backward")),
    ]))  # fmt: skip
    assert earlier <= interpreter.proven and any(k.startswith("relu_forward_float16") for k, _ in emulator.proven)
    never = reach.never(reached)
    assert never["triton _softmax_forward_kernel"] == ["float16"]
    assert never["cuda relu_forward"] == ["float32", "bfloat16"]
    assert len(never) == sum(map(len, reach.kernels().values()))
    everything = [f"{backend} {k} {t}" for backend, ks in reach.kernels().items() for k in ks for t in reach.DTYPES]
    assert reach.never(everything) == {}


def test_on_a_gpu_launches_outside_of_arenas_count_too(monkeypatch):
    launched = []
    monkeypatch.setattr(arena, "on_gpu", set())  # nothing ran there
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **options: launched.append(grid))
    x = SimpleNamespace(device=SimpleNamespace(type="cuda"), dtype="torch.bfloat16", data_ptr=None)
    watch = reach.Watch(gpu=True)
    with arena.recording_all(), watch.one():
        kernels._softmax_forward_kernel[(3,)](x, x)
    assert launched == [(3,)] and watch.reached() == ("triton _softmax_forward_kernel bfloat16",)


TOY = """
import pytest
from gpulayers.testing import interpreter

DEVICE = "cpu"

def ran(kernel, *dtypes):
    interpreter.proven.update((kernel, dtype) for dtype in dtypes if DEVICE)

def test_no_kernel(): pass

@pytest.mark.parametrize("i", range(3))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax(dtype, i): ran("_softmax_forward_kernel", dtype)

@pytest.mark.parametrize("i", range(3))
def test_others(i):
    ran("_softmax_backward_kernel", "float16 float32", "float32")
    assert i < 2
"""


def test_a_run_in_turn_says_what_ran_and_what_never_did(tmp_path):
    toy = tmp_path / "test_toy.py"
    toy.write_text(TOY)
    assert device_tests.run(tmp_path, 120, 2, [toy]) == device_tests.FAILED
    lines = [json.loads(line) for line in (tmp_path / "tests.jsonl").read_text().splitlines()]
    started = [o["id"].rpartition("::")[2] for o in lines if o["outcome"] == "started"]
    assert {*started[:3]} == {"test_softmax[float32-0]", "test_softmax[bfloat16-0]", "test_others[0]"}
    assert started[-1] == "test_no_kernel" and len(started) == len({*started}) == 10
    found = json.loads((tmp_path / "tests.json").read_text())
    assert found["outcomes"] == {"passed": 9, "failed": 1} and found["failed"][0].endswith("test_others[2]")
    assert found["reached"] == [
        "triton _softmax_backward_kernel float16",
        "triton _softmax_backward_kernel float32",
        "triton _softmax_forward_kernel bfloat16",
        "triton _softmax_forward_kernel float32",
    ]
    assert found["never"]["triton _softmax_forward_kernel"] == ["float16"] and found["never"]["cuda relu_forward"]
    assert all(o.reached for i, o in read(tmp_path / "tests.jsonl").items() if "no_kernel" not in i)
