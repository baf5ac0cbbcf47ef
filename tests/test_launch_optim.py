"""AdamW's step by a tape: lr and the count are its arguments, and whatever changes besides is noticed."""

import contextlib
import copy
import struct

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from gpulayers import dispatch  # noqa: E402
from gpulayers.torch import _again  # noqa: E402
from gpulayers.torch.optim import AdamW  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the null driver would stand for the GPU's own")
SHAPES = [(8, 16), (16,), (4, 4, 3, 3), (0, 4), (130,)]


@pytest.fixture
def taped(monkeypatch):
    """The steps that were asked of a tape, and whether it made them."""
    found = []
    step = _again.Again.step
    monkeypatch.setattr(_again.Again, "step", lambda self, *args: found.append(step(self, *args)) or found[-1])
    return found


class Training:
    def __init__(self, **options):
        self.params = [torch.nn.Parameter(torch.randn(s)) for s in SHAPES]
        self.optimizer = AdamW(self.params, **options)

    def step(self):
        for p in self.params:
            p.grad = torch.randn_like(p)
        self.optimizer.step()

    def steps(self, times):
        for _ in range(times):
            self.step()
        return self

    def counts(self):
        return [float(self.optimizer.state[p]["step"]) for p in self.params]


def test_steps_are_made_by_a_tape_with_lr_as_its_argument(driver, taped):
    t = Training(lr=0.1, weight_decay=0.5, betas=(0.5, 0.75)).steps(3)
    assert taped == []
    for group in t.optimizer.param_groups:
        group["lr"] = 0.2
    _, (write, update) = driver.noted(t.step)
    assert taped == [True] and (write.kernel, update.kernel) == ("_write_kernel", "_adamw_kernel")
    numbers = struct.unpack("9f", update.parameters[-16 - 36 : -16])
    step_size, root = 0.2 / (1 - 0.5**4), (1 - 0.75**4) ** 0.5
    assert numbers == pytest.approx((1 - 0.2 * 0.5, step_size, root, 1e-8, 0.5, 0.5, 0.75, 0.25, 1.0), rel=1e-6)
    state = [t.optimizer.state[p] for p in t.params if p.numel()]
    filled = [p for p in t.params if p.numel()]
    tables = [filled, [p.grad for p in filled], [s["exp_avg"] for s in state], [s["exp_avg_sq"] for s in state]]
    addresses = [x.data_ptr() for table in tables for x in table]
    written = struct.unpack_from(f"{len(addresses)}Q", write.parameters, 12)
    assert list(written) == addresses and t.counts() == [4.0] * len(SHAPES)


def test_parameters_versions_and_state_dicts(driver, taped):
    t = Training().steps(4)
    versions = [p._version for p in t.params]
    t.step()
    assert taped == [True, True] and all(p._version > v for p, v in zip(t.params, versions))
    saved = t.optimizer.state_dict()
    plain = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in t.params])
    plain.load_state_dict(saved)
    assert {float(s["step"]) for s in plain.state.values()} == {5.0}
    assert copy.deepcopy(t.optimizer).state_dict()["state"][0]["step"] == 5


def other_dtype(t):
    t.params[0].data = t.params[0].data.bfloat16()
    t.params[0].grad = None


def another_state(t):
    p = t.params[1]
    t.optimizer.state[p] = {k: v.clone() for k, v in t.optimizer.state[p].items()}


def loaded(t):
    t.optimizer.load_state_dict(t.optimizer.state_dict())


def turned(t):
    p = t.params[0]
    p.data = torch.empty(p.shape[::-1]).t()


CHANGES = {
    "another parameter": lambda t: t.optimizer.param_groups[0]["params"].append(torch.nn.Parameter(torch.randn(3))),
    "a parameter's dtype": other_dtype,
    "a parameter's strides": turned,
    "a state of one's own": another_state,
    "a state dict": loaded,
    "a count": lambda t: t.optimizer.state[t.params[0]]["step"].add_(3),
    "maximize": lambda t: t.optimizer.param_groups[0].update(maximize=True),
    "nothing": lambda t: t.optimizer.param_groups[0].update(amsgrad=False, foreach=False, capturable=False),
    "policy": lambda t: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_is_noticed(driver, taped, change):
    t = Training().steps(4)
    assert taped.pop()
    CHANGES[change](t)
    with dispatch.policy(strict=True) if change == "policy" else contextlib.nullcontext():
        t.step()
    assert taped[:1] == ([True] if change == "nothing" else [] if change == "maximize" else [False])
    wanted = {"a count": [8.0, *[5.0] * 4]}.get(change, [5.0] * 5)
    assert t.counts() == wanted


def test_a_parameter_without_a_gradient(driver, taped):
    t = Training().steps(4)
    for p in t.params[1:]:
        p.grad = torch.randn_like(p)
    t.params[0].grad = None
    t.optimizer.step()
    assert taped[-1] is False and t.counts() == [4.0, *[5.0] * 4]


def test_wrong_numbers_raise_what_they_raise(driver):
    t = Training().steps(4)
    t.optimizer.param_groups[0]["eps"] = -1.0
    with dispatch.policy(strict=True), pytest.raises(dispatch.Refused, match="eps ≥ 0"):
        t.step()
