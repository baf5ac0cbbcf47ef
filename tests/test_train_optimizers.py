"""Optimizers step each weight as torch's do, whenever its gradients come, and know whose state they have."""

import copy
import sys

import numpy as np
import pytest
import torch

import gpulayers as gl
from gpulayers.layers._weight import Weight
from gpulayers.ops import optim as ops

SHAPES = {"a": (3, 2), "b": (4,), "c": ()}
FROM = {"a": 0, "b": 3, "c": 1}
"""The step in which each weight's first gradient comes; c has one in every other step."""


def weights(seed: int = 0) -> dict[str, Weight]:
    random = np.random.default_rng(seed)
    return {name: Weight(name, np.asarray(random.standard_normal(s))) for name, s in SHAPES.items()}


def gradients(step: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(100 + step)
    drawn = {name: np.asarray(random.standard_normal(s)) for name, s in SHAPES.items()}
    return {n: g for n, g in drawn.items() if step >= FROM[n] and (n != "c" or step % 2)}


CASES = [
    ("AdamW", {}),
    ("AdamW", {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}),
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02}),
    ("Adam", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1}),
    ("NAdam", {"weight_decay": 0.1, "momentum_decay": 0.1, "decoupled_weight_decay": True}),
    ("RAdam", {"weight_decay": 0.1, "betas": (0.9, 0.8)}),
    ("RAdam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("Adamax", {"weight_decay": 0.1}),
    ("Adagrad", {"weight_decay": 0.1, "lr_decay": 0.1}),
    ("Adagrad", {}),
    ("RMSprop", {"weight_decay": 0.1}),
    ("RMSprop", {"centered": True, "momentum": 0.9}),
]


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_late_gradients_are_torchs(name, options, monkeypatch):
    """Eight steps in float64; a is always there, b is unfrozen in the fourth, c's gradients come now and then."""
    if name == "NAdam":  # whose product of momentums torch holds in float32
        monkeypatch.setattr(sys.modules["torch.optim.nadam"], "_get_scalar_dtype", lambda: torch.float64)
    mine = weights()
    theirs = {n: torch.nn.Parameter(torch.tensor(w.data)) for n, w in mine.items()}
    optimizer = getattr(gl, name)(0.1, **options)
    reference = getattr(torch.optim, name)(theirs.values(), lr=0.1, **options)
    for step in range(8):
        grads = gradients(step)
        mine["b"].trainable = step >= FROM["b"]
        for n, w in mine.items():
            w.zero_grad()
            theirs[n].grad = None
            if n in grads:
                w.grad, theirs[n].grad = grads[n], torch.tensor(grads[n])
        optimizer.step(mine)
        reference.step()
        for n, w in mine.items():
            np.testing.assert_allclose(
                w.data, theirs[n].detach().numpy(), rtol=1e-12, atol=1e-14, err_msg=f"{n} {step}"
            )


def test_momentum_that_is_turned_on_later_is_torchs():
    mine = weights()
    theirs = {n: torch.nn.Parameter(torch.tensor(w.data)) for n, w in mine.items()}
    optimizer, reference = gl.SGD(0.1, dampening=0.5), torch.optim.SGD(theirs.values(), lr=0.1, dampening=0.5)
    for step in range(6):
        optimizer.momentum = reference.param_groups[0]["momentum"] = 0.9 if step > 2 else 0.0
        for n, g in gradients(9 + step).items():
            mine[n].grad, theirs[n].grad = g, torch.tensor(g)
        optimizer.step(mine)
        reference.step()
        for n, w in mine.items():
            np.testing.assert_allclose(w.data, theirs[n].detach().numpy(), rtol=1e-12, err_msg=f"{n} {step}")


@pytest.mark.parametrize("optimizer, most", [(gl.AdamW(), 2), (gl.SGD(momentum=0.9), 1), (gl.SGD(), 1)])
def test_weights_at_one_step_share_a_launch(monkeypatch, optimizer, most):
    """One launch where all weights began together; one more for AdamW's weights that did not."""
    launches = []
    for op in (ops.sgd_update, ops.adamw_update):

        def counted(data, *rest, op=op, **options):
            launches.append(len(data))
            return op(data, *rest, **options)

        monkeypatch.setattr(ops, op.name, counted)
    mine = weights()
    for step in range(3):
        launches.clear()
        for w in mine.values():
            w.grad = np.ones(w.shape)
        mine["b"].trainable = step > 0
        optimizer.step(mine)
        if step == 0:
            assert launches == [2]
    assert len(launches) == most and sum(launches) == 3


def trained(**options) -> tuple[gl.AdamW, dict[str, Weight]]:
    optimizer, mine = gl.AdamW(**options), weights()
    for w in mine.values():
        w.grad = np.ones(w.shape)
    optimizer.step(mine)
    return optimizer, mine


def test_state_goes_with_its_options():
    """What was changed since it was made, too."""
    optimizer, mine = trained()
    optimizer.lr, optimizer.betas = 0.5, (0.7, 0.8)
    state = optimizer.state_dict()
    other = gl.AdamW()
    other.load_state_dict(state, mine)
    assert (other.lr, other.betas, other.steps, other.counts) == (0.5, (0.7, 0.8), 1, dict.fromkeys(SHAPES, 1))
    twin = {n: Weight(n, w.data.copy()) for n, w in mine.items()}
    fresh = gl.AdamW()
    fresh.load_state_dict(state, twin)
    for o, named in ((optimizer, mine), (fresh, twin)):
        for w in named.values():
            w.grad = np.full(w.shape, 0.3)
        o.step(named)
    assert all(np.array_equal(mine[n].data, twin[n].data) for n in SHAPES)


def test_another_state_is_refused_before_anything_changes():
    optimizer, mine = trained()
    state = optimizer.state_dict()
    wrong = dict(arrays={"a/exp_avg": np.zeros(7), "a/exp_avg_sq": np.zeros(7)})
    elsewhere = {f"x.{n}": w for n, w in mine.items()}
    for target, given, named, text in (
        (gl.SGD(), state, mine, r"SGD: the rule is the same optimizer, SGD with .*; the state is that of AdamW with"),
        (gl.AdamW(), state, elsewhere, r"the rule is the state of x.a, x.b, x.c; it is that of a, b, c"),
        (gl.AdamW(), state, {"a": mine["a"]}, r"the rule is the state of a; it is that of b, c"),
        (gl.AdamW(), state | wrong, mine, r"the weights' shapes; got a/exp_avg: \[3, 2\] ← \[7\]"),
        (gl.AdamW(lambda step: 0.1), state, mine, "lr: the rule is a value, as where the state comes from; got a func"),
        (gl.AdamW(), trained(lr=lambda step: 0.1)[0].state_dict(), mine, "lr: the rule is a function, as where"),
        (gl.AdamW(), {"steps": 3}, mine, r"state: the rule is what state_dict\(\) gives; it lacks algorithm, arrays"),
    ):
        with pytest.raises(ValueError, match=text):
            target.load_state_dict(given, named)
        assert target.steps == 0 and not target.state and not target.counts


def test_an_optimizer_serves_one_model():
    """Names that are equal do not make the momentum of one model that of another; copies go together."""
    optimizer, mine = trained()
    others = weights(1)
    before = {n: w.data.copy() for n, w in others.items()}
    for w in others.values():
        w.grad = np.ones(w.shape)
    with pytest.raises(ValueError, match=r"AdamW: the rule is an optimizer for each model; .* another's a, b, c"):
        optimizer.step(others)
    assert all(np.array_equal(w.data, before[n]) for n, w in others.items()) and optimizer.steps == 1
    copied, twins = copy.deepcopy(optimizer), copy.deepcopy(mine)
    copied.step(twins)
    optimizer.step(mine)
    assert all(np.array_equal(mine[n].data, twins[n].data) for n in SHAPES)


def test_state_of_weights_that_are_gone_goes():
    optimizer, mine = trained()
    del mine["b"]
    optimizer.attach(mine)
    assert set(optimizer.counts) == {"a", "c"} == {name.split("/")[0] for name in optimizer.state_dict()["arrays"]}


def test_fit_refuses_an_optimizer_of_another_model():
    x, y = np.ones((4, 2), np.float32), np.zeros(4, np.int64)
    optimizer = gl.AdamW()
    first = gl.Sequential(gl.Linear(2, 2))
    for _ in range(2):
        first.fit(x, y, optimizer=optimizer, progress=False)
    assert optimizer.steps == 2
    for other in (gl.Sequential(gl.Linear(2, 2)), gl.Sequential(gl.Flatten(), gl.Linear(2, 2)), gl.Linear(2, 2)):
        with pytest.raises(ValueError, match="the rule is an optimizer for each model"):
            other.fit(x, y, optimizer=optimizer, progress=False)


def test_lion_is_torchs_drop_in():
    from gpulayers.torch.optim import Lion

    mine, options = weights(), {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}
    theirs = {n: torch.nn.Parameter(torch.tensor(w.data)) for n, w in mine.items()}
    optimizer, reference = gl.Lion(**options), Lion(theirs.values(), **options)
    for step in range(3, 6):
        for n, g in gradients(step).items():
            mine[n].grad, theirs[n].grad = g, torch.tensor(g)
        optimizer.step(mine)
        reference.step()
    for n, w in mine.items():
        np.testing.assert_allclose(w.data, theirs[n].detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("kind", [gl.Adam, gl.AdamW])
def test_masters_follow_a_float32_model(kind):
    """16-bit weights are their masters, rounded; those of float32 have none; checkpoints and constraints know them."""
    half = {"a": Weight("a", weights()["a"].data.astype("f2")), "b": Weight("b", weights()["b"].data.astype("f4"))}
    wide = {n: Weight(n, w.data.astype("f4")) for n, w in half.items()}
    options = {"lr": 1e-3, "weight_decay": 0.1}
    mine, plain = kind(**options, master_weights=True), kind(**options)
    for step in range(3, 9):
        for n, g in gradients(step).items():
            if n in half:
                half[n].grad, wide[n].grad = (
                    g.astype(half[n].dtype),
                    g.astype("f2").astype("f4") if n == "a" else g.astype("f4"),
                )
        mine.step(half)
        plain.step(wide)
        if step == 5:
            state = mine.state_dict()
            assert {k: str(x.dtype) for k, x in state["arrays"].items() if k.startswith("a/")} == dict.fromkeys(
                ("a/exp_avg", "a/exp_avg_sq", "a/master"), "float32"
            )
            assert "b/master" not in state["arrays"]
            mine = kind(**options, master_weights=True)
            mine.load_state_dict(state, half)
    np.testing.assert_allclose(mine.state["a", "master"], wide["a"].data, rtol=1e-6)
    assert np.array_equal(half["a"].data, mine.state["a", "master"].astype("f2"))
    np.testing.assert_allclose(half["b"].data, wide["b"].data, rtol=1e-6)
    half["a"].assign(np.ones((3, 2), "f2"))
    mine.assigned("a", half["a"])
    assert (mine.state["a", "master"] == 1).all()


def test_rounding_by_chance_is_the_seeds():
    import ml_dtypes

    found = []
    for seed in (1, 1, 2):
        gl.random.seed(seed)
        w = {"w": Weight("w", np.ones(500, ml_dtypes.bfloat16))}
        w["w"].grad = np.ones(500, ml_dtypes.bfloat16)
        gl.AdamW(2.0**-11, weight_decay=0, stochastic_rounding=True).step(w)
        found.append(w["w"].data.astype("f4"))
    assert np.array_equal(*found[:2]) and not np.array_equal(*found[1:]) and 0 < (found[0] < 1).sum() < 300
    with pytest.raises(ValueError, match="AdamW: the rule is master_weights or stochastic_rounding; got both"):
        gl.AdamW(master_weights=True, stochastic_rounding=True)
