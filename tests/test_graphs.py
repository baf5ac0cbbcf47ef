"""What a CUDA graph needs: that launches do not depend on numbers which the host knows, those that an update names apart."""

import struct

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpulayers.bench.measuring.launching import subjects  # noqa: E402
from gpulayers.kernels.triton import optim  # noqa: E402

import gpulayers.torch as gt  # noqa: E402
from gpulayers import launch  # noqa: E402
from gpulayers.ops.activation import elu  # noqa: E402
from gpulayers.ops.optim import adamw_update, sgd_update  # noqa: E402
from gpulayers.testing.null_driver import same_memory  # noqa: E402
from gpulayers.torch.dropout import draw_seed  # noqa: E402
from gpulayers.torch.optim import _Left, _numbers  # noqa: E402

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")


@pytest.fixture
def driver(driver):
    """No tapes either: each call takes its launcher's road."""
    with launch.off():
        yield driver


def noted(driver, first, second) -> list:
    """The launches of two calls, over the same memory."""
    with same_memory() as memory:
        first()
        memory.keep()
        found = [driver.noted(first)[1]]
        memory.give()
        return [*found, driver.noted(second)[1]]


@needs_no_gpu
@pytest.mark.parametrize("subject", subjects(), ids=lambda subject: subject.op)
def test_launches_do_not_depend_on_values(subject, driver, monkeypatch):
    """Other inputs, other gradients, another seed, in the same memory: to the driver, the same bytes, both ways."""
    seed = torch.empty(2, dtype=torch.int64)
    monkeypatch.setattr(torch, "randint", lambda *limits, **where: seed.random_())
    # Their targets are converted where they differ.
    dtype = torch.float32 if subject.op in ("mse", "pointwise_loss", "row_loss") else torch.bfloat16
    layer = subject.make(gt)
    if isinstance(layer, torch.nn.Module) and subject.op != "batch_norm":
        layer = layer.to(dtype)
    x = torch.empty(subject.ours, dtype=dtype)
    x = (x.to(memory_format=torch.channels_last) if x.ndim == 4 else x).requires_grad_()
    dy = torch.empty_like(layer(x))

    def step(value: float) -> None:
        with torch.no_grad():
            x.normal_().mul_(value), dy.fill_(value)
        layer(x).backward(dy)

    found = noted(driver, lambda: step(1.0), lambda: step(float("nan")))
    assert found[0] == found[1] and len(found[0]) >= 2


@needs_no_gpu
def test_an_options_number_is_part_of_a_launch(driver):
    """A graph keeps it as it was when it was captured."""
    x = torch.empty(8, 64)
    first, second = noted(driver, lambda: elu(x, alpha=1.0), lambda: elu(x, alpha=2.0))
    assert first != second and [n._replace(parameters=b"") for n in first] == [
        n._replace(parameters=b"") for n in second
    ]


OPTIMIZERS = {
    "adamw": (adamw_update, optim.adamw_update_varying, 4, {"lr": 0.1, "step": 1}, {"lr": 0.3, "step": 9, "eps": 1e-5}),
    "sgd": (sgd_update, optim.sgd_update_varying, 3, {"lr": 0.1, "momentum": 0.5}, {"lr": 0.3, "momentum": 0.9}),
}


@needs_no_gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_take_their_numbers_as_named_arguments(name, driver):
    """A graph would keep them as they were: lr and the count of steps."""
    op, varying, count, *options = OPTIMIZERS[name]
    lists = [[torch.randn(8, 16), torch.randn(5)] for _ in range(count)]
    first, second = noted(driver, *(lambda given=given: op(*lists, **given) for given in options))
    assert first[:-1] == second[:-1]
    size = 4 * len(varying(**options[0]))
    for a, b, given in zip((first[-1], second[-1]), (second[-1], first[-1]), options):
        assert struct.unpack(f"{size // 4}f", a.parameters[-16 - size : -16]) == pytest.approx(
            varying(**given), rel=1e-6
        )
        rest = [each._replace(parameters=each.parameters[: -16 - size]) for each in (a, b)]
        assert rest[0] == rest[1]


def test_seeds_are_drawn_where_they_are_used():
    """On the input's device, by torch's generator, whose state a graph moves on; the host sees none."""
    assert draw_seed(torch.empty(3, device="meta")).device.type == "meta"


def test_numbers_on_a_gpu_are_left_to_torch():
    """No launch waits for them: torch's own capturable step reads them there."""
    with pytest.raises(_Left, match="lr is a tensor that has a gradient or is on a GPU"):
        _numbers({"lr": torch.empty((), device="meta")}, "lr")


def test_adamw_is_captured_as_torch_captures_it(monkeypatch):
    """torch's check comes first: an error, before anything has moved, where a graph would keep the count of steps."""
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = gt.optim.AdamW([p])
    name = "_accelerator_graph_capture_health_check"
    name = name if hasattr(optimizer, name) else "_cuda_graph_capture_health_check"  # before torch 2.10

    def check(self) -> None:
        raise RuntimeError("capturing, but not capturable")

    monkeypatch.setattr(torch.optim.Optimizer, name, check)
    with pytest.raises(RuntimeError, match="not capturable"):
        optimizer.step()
    assert not optimizer.state and torch.equal(p, torch.ones(3))
