"""When a tape is played and when it is not; what it keeps alive; what drop-ins make of it."""

import gc
import sys
import threading
import weakref

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpulayers.kernels.triton import _configs, _tile  # noqa: E402

import gpulayers as gl  # noqa: E402
import gpulayers.torch as gt  # noqa: E402
from gpulayers import dispatch, launch, transfer  # noqa: E402
from gpulayers.ops.activation import relu  # noqa: E402
from gpulayers.ops.dropout import dropout  # noqa: E402
from gpulayers.ops.linear import linear  # noqa: E402
from gpulayers.ops.softmax import softmax  # noqa: E402
from gpulayers.testing.check_tape import compare, replayed  # noqa: E402
from gpulayers.testing.null_driver import null_driver, same_memory  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
X = torch.empty(8, 64, dtype=torch.bfloat16)


class Taped:
    """An op whose call was taped; counts the calls that take the launcher's road."""

    def __init__(self, op, *inputs, **options):
        self.op, self.inputs, self.options, self.launched = op, inputs, options, 0
        replayed(self)
        self.forward = dispatch.plan_for(op, inputs, (), options)[0].run_forward
        self._run, self.forward.run = self.forward.run, self._counted
        self.forward.bind = lambda launcher, bind=self.forward.bind: self._count(bind(launcher))

    def _count(self, run):
        def counted(*args, **options):
            self.launched += 1
            return run(*args, **options)

        return counted

    def _counted(self, *args, **options):
        self.launched += 1
        return self._run(*args, **options)

    def __call__(self, *inputs, **options):
        return self.op(*(inputs or self.inputs), **self.options | options)

    def is_played(self, *inputs, **options):
        before = self.launched
        self(*inputs, **options)
        return self.launched == before


def shifted(x):
    """``x``'s like, at an address that 16 does not divide."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape)


def test_alignment(driver):
    """Each alignment has its own tape: other kernels serve it."""
    call, odd = Taped(softmax, X), shifted(X)
    assert call.is_played() and call.is_played(torch.empty_like(X))
    assert [call.is_played(odd) for _ in range(3)] == [False, False, True]
    assert call.is_played()
    with same_memory() as memory:
        launch.forget()
        for x in (X, odd):
            replayed(lambda x=x: (memory.keep(), call(x)))
            call.forward.run = call._run
            compare(driver, memory, "softmax", call.forward, x)


def test_device_and_threads(driver):
    """Memory comes from the current device, and a fresh thread may have none."""
    call = Taped(softmax, X)
    for device in (1, -1):
        with driver.current_device(device):
            assert not call.is_played()
    assert call.is_played()
    other = threading.Thread(target=lambda: seen.append(call.is_played()))
    seen = []
    other.start(), other.join()
    assert seen == [True]


def test_the_stream_is_asked_for_on_each_call(driver):
    call, seen = Taped(softmax, X), []
    for stream in (0, 0x7000, 0x9000):
        driver.streams[0] = stream
        seen += [noted.stream for noted in driver.noted(call)[1]]
    driver.streams[0] = 0
    assert seen == [0, 0x7000, 0x9000] and not call.launched


def test_metadata_options_needs_and_policy_have_plans_of_their_own(driver):
    call = Taped(softmax, X)
    forward = call.forward
    others = [
        (X.float(), {}, ()),
        (torch.empty(64, 8, dtype=X.dtype).t(), {}, ()),
        (X, {"axis": 0}, ()),
        (X, {}, ("x",)),
    ]
    for x, options, needs in others:
        assert dispatch.plan_for(softmax, [x], needs, options)[0].run_forward is not forward
    with dispatch.policy(strict=True):
        assert dispatch.plan_for(softmax, [X], (), {})[0].run_forward is not forward
    assert dispatch.plan_for(softmax, [X], (), {})[0].run_forward is forward


def test_tf32(driver):
    x, w = torch.empty(64, 64), torch.empty(64, 64)
    setting = torch.backends.cuda.matmul
    before, setting.fp32_precision = setting.fp32_precision, "ieee"
    try:
        call = Taped(linear, x, w)
        assert call.is_played()
        setting.fp32_precision = "tf32"
        assert [call.is_played() for _ in range(3)] == [False, False, True]
    finally:
        setting.fp32_precision = before


def test_tables_of_configurations(driver):
    call = Taped(softmax, X)
    with _configs.forced("softmax_forward", _configs.Row(None, 1024, 4)):
        assert not call.is_played()
    assert call.is_played()
    with _configs.asked() as found:
        assert not call.is_played() and found
    _configs.reload()
    assert not call.is_played()


def test_a_pretended_device_poisoned_memory_and_hooks_of_a_profiler(driver):
    from triton import knobs

    call, seen = Taped(softmax, X), []
    before, _tile.pretend = _tile.pretend, _tile.Device(90, 4, 232448)
    assert not call.is_played()
    _tile.pretend = before
    assert call.is_played()
    with transfer.poisoned():
        assert torch.isnan(call()[0, 0]) and not call.is_played()
    knobs.runtime.launch_enter_hook.add(seen.append)
    assert not call.is_played() and len(seen) == 1
    knobs.runtime.launch_enter_hook.remove(seen.append)
    call.is_played()


def test_globals_of_own_kernels(monkeypatch):
    """Triton raises where a global has changed since a kernel was compiled; a tape leaves that to Triton."""
    import own_kernels

    def double(x, *, empty):
        y = empty(x.shape, x.dtype)
        own_kernels.scale_kernel[(1,)](x, y, 512, BLOCK=512)
        return y

    op = gl.op("scaled", lambda x: 2 * x, lambda dy: 2 * dy, triton=(double, lambda dy, *, empty: dy))
    monkeypatch.setattr(dispatch, "_plans", {})
    with null_driver():  # the compiler finds the globals
        replayed(lambda: op(X))
        assert gl.explain(op, X).taped == {"forward": "taped"}
        monkeypatch.setattr(own_kernels, "FACTOR", own_kernels.tl.constexpr(3))
        with pytest.raises(RuntimeError, match="FACTOR has changed"):
            op(X)


def test_what_a_stack_does_not_hold_is_not_taped(driver, monkeypatch):
    monkeypatch.setattr(launch._record, "_MOST_ARRAYS", 1)
    replayed(lambda: softmax(X))
    assert gl.explain(softmax, X).taped["forward"] == f"not taped: {launch.UNTAPED['large']}"


def test_each_layout_of_dy_has_its_tape(driver):
    _, call = relu.record(X)
    backward = call.plan.run_backward
    for dy in (X, X.new_empty(()).expand(X.shape), X.new_empty(64, 8).t()):
        replayed(lambda dy=dy: call.backward(dy))
    (entries,) = backward.kinds.values()
    assert [kind.state() for _, kind in entries] == ["taped"] * 3
    backward.run = None  # nothing is launched any more
    for dy in (X, X.new_empty(()).expand(X.shape), X.new_empty(64, 8).t()):
        call.backward(dy)


def test_values_that_change(driver):
    """A seed is read by the kernel; each p has its tape, as many as there may be."""
    seeds = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    call = Taped(dropout, X, seeds[0], p=0.5)
    assert call.is_played(X, seeds[1])
    noted = [driver.noted(lambda seed=seed: call(X, seed))[1][0].parameters for seed in seeds]
    assert all(seed.data_ptr().to_bytes(8, "little") in raw for seed, raw in zip(seeds, noted))
    assert [call.is_played(p=0.25) for _ in range(4)] == [False, False, False, True] and call.is_played(p=0.5)
    for i in range(20):
        call(p=i / 100)
    assert len(call.forward.kinds) == 8 and not call.is_played(p=0.9) and call.is_played()


def test_arrays_that_share_memory(driver):
    """Recorded, they would be taken for one another; replayed, each is where it is."""
    w = torch.empty(64, 64, dtype=X.dtype)
    replayed(lambda: linear(w, w))
    assert gl.explain(linear, w, w).taped["forward"] == f"not taped: {launch.UNTAPED['shared']}"
    call = Taped(linear, w, torch.empty_like(w))
    assert call.is_played(w, w)


def test_replays_leak_nothing(driver):
    call = Taped(softmax, X)
    tape, odd = call.forward.kinds[()].tapes[0], shifted(X)
    named = [X, odd, None, NotImplemented, tape, torch.bfloat16, 0, 8, 64]

    def measured():
        gc.collect()
        return sys.getallocatedblocks(), [sys.getrefcount(x) for x in named]

    def replay(times):
        for _ in range(times):
            tape(X), tape(odd)

    replay(100)
    before = measured()
    replay(50_000)
    blocks, counts = measured()
    assert blocks - before[0] < 20 and all(b - a < 20 for a, b in zip(before[1], counts))


def test_what_is_let_go_is_freed(driver):
    """A tape holds none of a model's arrays, and goes with its plan."""
    kind = launch._taped._tape.player()
    tapes = lambda: [x for x in gc.get_objects() if type(x) is kind]  # noqa: E731
    gc.collect()
    before = tapes()  # held: other tests' go with their plans, too

    def train():
        layer, x = gt.Linear(64, 64).bfloat16(), X.clone().requires_grad_()
        replayed(lambda: layer(x).sum().backward())
        return [weakref.ref(t) for t in (layer, layer.weight, x)]

    alive = train()
    assert len(tapes()) == len(before) + 2
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    dispatch._plans.clear()
    for cache in (gt.linear._linear._known, gt.linear._linear._latest):
        cache.clear()
    gc.collect()
    assert len(tapes()) == len(before)


def test_threads_share_a_tape(driver):
    """Arguments are each call's own."""
    call, wrong = Taped(softmax, X), []
    tape = call.forward.kinds[()].tapes[0]

    def work(mine):
        for _ in range(500):
            (y,) = tape(mine)
            wrong.extend([] if y.shape == mine.shape else [y])

    threads = [threading.Thread(target=work, args=(torch.empty_like(X),)) for _ in range(4)]
    before = driver.launches
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and driver.launches == before + 2000


# --- drop-ins --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_launcher(monkeypatch):
    """Calling it: from now on Triton launches nothing."""

    def forbid():
        from triton.runtime.jit import JITFunction

        def run(self, *args, **kwargs):
            raise AssertionError(f"{self.fn.__name__} was launched by Triton")

        monkeypatch.setattr(JITFunction, "run", run)

    return forbid


def layers():
    last = torch.channels_last
    image = torch.randn(2, 32, 8, 8, dtype=torch.bfloat16).to(memory_format=last)
    return {
        "linear": (gt.Linear(64, 64).bfloat16(), X),
        "layer_norm": (gt.LayerNorm(64).bfloat16(), X),
        "batch_norm": (gt.BatchNorm2d(32), image),
        "conv2d": (gt.Conv2d(32, 32, 3).bfloat16().to(memory_format=last), image),
        "max_pool": (gt.MaxPool2d(2), image),
        "gelu": (gt.GELU(), X),
        "dropout": (gt.Dropout(0.5), X),
        "relu in place": (gt.ReLU(inplace=True), X),
        "softmax": (gt.Softmax(-1), X),
    }


@pytest.mark.parametrize("name", layers())
def test_a_layer_launches_by_tapes_alone(driver, no_launcher, name):
    layer, x = layers()[name]
    x = x.clone().requires_grad_()

    def step():
        y = layer(x * 1)
        y.backward(torch.ones_like(y))
        with torch.no_grad():
            layer(x * 1)

    replayed(step)
    no_launcher()
    before = driver.launches
    step()
    assert driver.launches > before


def test_what_autograd_hears_of_a_tape(driver):
    """Versions of what it writes to; that outputs are new; gradients of gradients by torch's own operations."""
    layer, x = gt.BatchNorm2d(32), layers()["batch_norm"][1].clone().requires_grad_()
    y = replayed(lambda: layer(x))
    version = layer.running_mean._version
    z = layer(x)
    assert layer.running_mean._version == version + 1 and y.data_ptr() != z.data_ptr()
    x.data_ptr(), replayed(lambda: layer(x).sum().backward())
    y = layer(x)
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    soft, given = gt.Softmax(-1), torch.randn(4, 8).requires_grad_()
    replayed(lambda: soft(given).square().sum().backward())
    out = soft(given)
    (g,) = torch.autograd.grad(out.square().sum(), given, create_graph=True)
    assert g.requires_grad


def test_saved_tensors_may_come_back_with_other_strides(driver):
    """As hooks that offload them do: the tape's own check of what was saved."""
    x = X.clone().requires_grad_()
    layer = gt.GELU()
    replayed(lambda: layer(x).backward(X))
    backward = gt.activation._gelu._latest[0].plan.run_backward
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.t().contiguous().t()):
        layer(x).backward(X)
    (entries,) = backward.kinds.values()
    assert len(entries) == 2


def test_autocast_is_part_of_what_a_repeated_call_is_checked_for(driver, monkeypatch):
    layer, x, slow = gt.Linear(64, 64), torch.empty(8, 64), []
    slowly = gt.linear.TorchOp._slowly
    monkeypatch.setattr(gt.linear.TorchOp, "_slowly", lambda self, *args: slow.append(self) or slowly(self, *args))

    def run(dtype, on=True):
        slow.clear()
        with torch.autocast("cpu", dtype, enabled=on):
            return layer(x).dtype

    for dtype in (torch.bfloat16, torch.float16):
        replayed(lambda dtype=dtype: run(dtype))
        assert run(dtype) is dtype and not slow
    assert run(torch.bfloat16) is torch.bfloat16 and slow
    assert run(torch.bfloat16) is torch.bfloat16 and not slow
    assert run(torch.bfloat16, on=False) is torch.float32 and slow
