"""Wrong calls of drop-ins raise what torch.nn raises, the first time and after a right one; the rule is a note."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402

import gpulayers.torch as gt  # noqa: E402

WRONG_CALLS = {
    "wrong last size": lambda m: m.Linear(3, 4)(torch.ones(2, 5)),
    "integers into linear": lambda m: m.Linear(3, 4)(torch.ones(2, 3, dtype=torch.int64)),
    "mixed dtypes": lambda m: m.Linear(3, 4)(torch.ones(2, 3, dtype=torch.float64)),
    "not a tensor": lambda m: m.Linear(3, 4)([1.0, 2.0, 3.0]),
    "unknown keyword": lambda m: m.Linear(3, 4, bios=True),
    "wrong channels": lambda m: m.Conv2d(3, 4, 3)(torch.ones(2, 5, 8, 8)),
    "wrong rank": lambda m: m.Conv2d(3, 4, 3)(torch.ones(2, 3)),
    "kernel larger than image": lambda m: m.Conv2d(3, 4, 5)(torch.ones(2, 3, 2, 2)),
    "strided same": lambda m: m.Conv2d(3, 4, 3, stride=2, padding="same"),
    "groups": lambda m: m.Conv2d(3, 4, 3, groups=2),
    "unknown padding mode": lambda m: m.Conv2d(3, 4, 3, padding_mode="mirror"),
    "batch norm rank": lambda m: m.BatchNorm2d(3)(torch.ones(2, 3, 4)),
    "batch norm channels": lambda m: m.BatchNorm1d(3)(torch.ones(2, 4)),
    "one value a channel": lambda m: m.BatchNorm1d(3)(torch.ones(1, 3)),
    "normalized shape": lambda m: m.LayerNorm(3)(torch.ones(2, 4)),
    "rms shape": lambda m: m.RMSNorm(3)(torch.ones(2, 4)),
    "p outside": lambda m: m.Dropout(1.5),
    "dim outside": lambda m: m.Softmax(3)(torch.ones(2, 3)),
    "integer softmax": lambda m: m.Softmax(1)(torch.ones(2, 3, dtype=torch.int64)),
    "reduction": lambda m: m.CrossEntropyLoss(reduction="all")(torch.ones(2, 3), torch.tensor([0, 1])),
    "label out of range": lambda m: m.CrossEntropyLoss()(torch.ones(2, 3), torch.tensor([0, 3])),
    "negative label": lambda m: m.NLLLoss()(torch.ones(2, 3), torch.tensor([0, -1])),
    "batch sizes": lambda m: m.CrossEntropyLoss()(torch.ones(2, 3), torch.tensor([0, 1, 2])),
    "integer logits": lambda m: m.CrossEntropyLoss()(torch.ones(2, 3, dtype=torch.int64), torch.tensor([0, 1])),
    "class weights": lambda m: m.CrossEntropyLoss(weight=torch.ones(4))(torch.ones(2, 3), torch.tensor([0, 1])),
    "smoothing": lambda m: m.CrossEntropyLoss(label_smoothing=2.0)(torch.ones(2, 3), torch.tensor([0, 1])),
    "mse shapes": lambda m: m.MSELoss()(torch.ones(2, 3), torch.ones(2, 4)),
    "odd glu": lambda m: m.GLU()(torch.ones(2, 3)),
    "prelu channels": lambda m: m.PReLU(4)(torch.ones(2, 3)),
    "pool padding": lambda m: m.MaxPool2d(2, padding=2)(torch.ones(1, 1, 8, 8)),
    "pool rank": lambda m: m.MaxPool2d(2)(torch.ones(8, 8)),
    "pool too large": lambda m: m.AvgPool2d(9)(torch.ones(1, 1, 4, 4)),
    "divisor": lambda m: m.AvgPool2d(2, divisor_override=0)(torch.ones(1, 1, 4, 4)),
    "gelu kind": lambda m: m.GELU(approximate="sigmoid")(torch.ones(3)),
    "leaf in place": lambda m: m.ReLU(inplace=True)(torch.ones(3, requires_grad=True)),
    "lambda": lambda m: m.Softshrink(-1.0)(torch.ones(3)),
    "nothing into linear": lambda m: m.Linear(3, 4)(None),
    "nothing into an activation": lambda m: m.ReLU()(None),
    "nothing into dropout": lambda m: m.Dropout()(None),
    "a number into softmax": lambda m: m.Softmax(1)(3),
    "a dim that is a float": lambda m: [m.Softmax(dim)(torch.ones(7, 3)) for dim in (1, 1.0)],
    "a dim that is a bool": lambda m: [m.GLU(dim)(torch.ones(7, 4)) for dim in (1, True)],
    "a word for eps": lambda m: m.LayerNorm(3, eps="small")(torch.ones(2, 3)),
    "several eps": lambda m: m.RMSNorm(3, eps=torch.ones(2))(torch.ones(2, 3)),
    "several slopes": lambda m: m.LeakyReLU(torch.ones(2))(torch.ones(2, 3)),
    "negative eps": lambda m: m.BatchNorm1d(3, eps=-1.0)(torch.ones(2, 3)),
    "no eps in training": lambda m: m.BatchNorm1d(3, eps=0.0)(torch.ones(2, 3)),
}


@pytest.mark.parametrize("what", WRONG_CALLS)
def test_error_types(what):
    call = WRONG_CALLS[what]
    with pytest.raises(Exception) as theirs:
        call(nn)
    with pytest.raises(type(theirs.value)):
        call(gt)


def test_an_option_that_is_a_tensor_may_change():
    x, eps = torch.randn(4, 6), torch.tensor(1e-5, dtype=torch.float64)
    for value in (1e-5, 1.0, 5.0):
        eps.fill_(value)
        for _ in range(3):
            for call in (
                lambda m: m.layer_norm(x, (6,), eps=eps),
                lambda m: m.rms_norm(x, (6,), eps=eps),
                lambda m: m.batch_norm(x, None, None, training=True, eps=eps),
                lambda m: m.leaky_relu(x, eps),
                lambda m: m.softplus(x, eps),
            ):
                torch.testing.assert_close(call(gt.functional), call(nn.functional))


def test_errors_of_the_data_name_the_op():
    with pytest.raises(IndexError, match="cross_entropy: target: the rule is 0 ≤ target < C = 3"):
        gt.CrossEntropyLoss()(torch.ones(2, 3, requires_grad=True), torch.tensor([0, 3]))


def test_errors_of_the_rule_are_torchs_with_a_note():
    with pytest.raises(RuntimeError) as error:
        gt.Linear(3, 4)(torch.ones(2, 5))
    assert any("linear: " in note and "the rule is" in note for note in error.value.__notes__)
