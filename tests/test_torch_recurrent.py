"""RNN, LSTM, GRU and their cells of ``gpulayers.torch`` against torch's own, and the layers of arrays against both."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn as nn  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence  # noqa: E402

import gpulayers as gl  # noqa: E402
import gpulayers.torch as gt  # noqa: E402
from gpulayers.torch.recurrent import _recurrent  # noqa: E402

SIZES = {"input_size": 3, "hidden_size": 4}
OPTIONS = {  # every option with every other one, at least once
    "LSTM": [
        {},
        {"bias": False, "batch_first": True, "bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "proj_size": 2},
        {"num_layers": 2, "batch_first": True, "proj_size": 3, "bias": False},
    ],
    "GRU": [{"bias": False}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True, "num_layers": 2, "bias": False}],
    "RNN": [{"nonlinearity": "relu", "bidirectional": True}, {"num_layers": 2, "bias": False, "batch_first": True}],
}  # fmt: skip
CALLS = [(name, options) for name, each in OPTIONS.items() for options in each]


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(name, **options):
    """(ours, torch's), equal."""
    theirs = getattr(nn, name)(**SIZES | options).double()
    for number, p in enumerate(theirs.parameters()):
        p.data = draw(*p.shape, seed=number) * 0.6
    ours = getattr(gt, name)(**SIZES | options).double()
    ours.load_state_dict(theirs.state_dict())
    assert isinstance(ours, type(theirs)) and ours.state_dict().keys() == theirs.state_dict().keys()
    return ours, theirs


def flat(found):
    """All tensors in what a module gives."""
    if isinstance(found, PackedSequence):
        return [found.data, found.batch_sizes, found.unsorted_indices]
    return [found] if not isinstance(found, tuple) else [t for each in found for t in flat(each)]


def outcome(module, x, states, how):
    """Outputs and all gradients of a call."""
    x, *states = (t.detach().clone().requires_grad_() for t in (x, *states))
    given = () if not states else (tuple(states) if "LSTM" in type(module).__name__ else states[0],)
    outputs = flat(module(how(x), *given))
    total = sum((t.double() * (i + 1)).sin().sum() for i, t in enumerate(outputs) if t.is_floating_point())
    return [*outputs, *torch.autograd.grad(total, [x, *module.parameters(), *states])]


def states_of(module, *batch):
    count = module.num_layers * (2 if module.bidirectional else 1)
    widths = [module.proj_size or module.hidden_size] + [module.hidden_size] * (module.mode == "LSTM")
    return [draw(count, *batch, n, seed=9) for n in widths]


def same(ours, theirs, *call):
    for a, b in zip(outcome(ours, *call), outcome(theirs, *call), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def packed(x):
    """Sequences of other lengths than their neighbours', not sorted."""
    return pack_sequence([x[:n, i] for i, n in enumerate((2, 4, 3))], enforce_sorted=False)


@pytest.mark.parametrize("name, options", CALLS, ids=str)
def test_as_torchs(name, options):
    ours, theirs = pair(name, **options)
    same(ours, theirs, draw(4, 3, 3), (), lambda x: x)
    same(ours, theirs, draw(1, 1, 3), states_of(ours, 1), lambda x: x)  # one step of one sequence
    same(ours, theirs, draw(3, 3), states_of(ours), lambda x: x)  # no batch
    same(ours, theirs, draw(4, 3, 3), states_of(ours, 3), packed)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name):
    ours, theirs = pair(name)
    states = [draw(2, 4, seed=n) for n in range(1 + (name == "LSTMCell"))]
    same(ours, theirs, draw(2, 3), states, lambda x: x)
    same(ours, theirs, draw(3), [], lambda x: x)
    if name == "RNNCell":
        same(*pair(name, nonlinearity="relu", bias=False), draw(2, 3), states, lambda x: x)


def test_dropout_between_layers():
    """None in evaluation; in training what torch's p says, and nothing before the first layer or behind the last."""
    ours, theirs = pair("GRU", num_layers=2, dropout=1.0)
    same(ours, theirs, draw(3, 2, 3), (), lambda x: x)
    same(ours.eval(), theirs.eval(), draw(3, 2, 3), (), lambda x: x)


WRONG = {
    "dimensions": lambda m: m(draw(2, 3, 3, 3)),
    "features": lambda m: m(draw(2, 3, 5)),
    "no step": lambda m: m(draw(0, 3, 3)),
    "dtype": lambda m: m(draw(2, 3, 3).float()),
    "state": lambda m: m(draw(2, 3, 3), (draw(1, 3, 5), draw(1, 3, 4))),
    "state of one sequence": lambda m: m(draw(2, 3), (draw(1, 1, 4), draw(1, 1, 4))),
    "one state": lambda m: m(draw(2, 3, 3), draw(1, 3, 4)),
    "no sequence": lambda m: m(draw(2, 0, 3))[0].shape,
}


@pytest.mark.parametrize("what", WRONG)
def test_errors_are_torchs(what):
    found = []
    for m in pair("LSTM"):
        try:
            found.append(WRONG[what](m))
        except Exception as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]


def test_patch_finds_them():
    model = nn.ModuleList([nn.LSTM(3, 4), nn.GRU(3, 4), nn.RNN(3, 4), nn.LSTMCell(3, 4)])
    assert len(gt.patch(model).replaced) == 4 and type(model[0]) is gt.LSTM
    y, _ = model[0](draw(2, 2, 3).float())
    assert "Recurrent" in repr(y.grad_fn.next_functions) or "recurrent" in repr(y.grad_fn)


def test_gradients_of_gradients_are_refused():
    """Nothing is dropped in silence; batches of gradients are computed."""
    ours, theirs = pair("LSTM", proj_size=2)
    x = draw(3, 2, 3).requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradient of its gradient"):
        torch.autograd.grad(ours(x)[0].sum(), x, create_graph=True)
    for name, options in CALLS[2:8:2]:
        ours, theirs = pair(name, **options)
        dys = draw(2, *theirs(x)[0].shape)
        a, b = (torch.autograd.grad(m(x)[0], x, dys, is_grads_batched=True)[0] for m in (ours, theirs))
        torch.testing.assert_close(a, b)


def test_forward_differentiation():
    """Through torch's own operations."""
    ours, theirs = pair("GRU", bidirectional=True)
    x = draw(3, 2, 3)
    call = lambda m: torch.func.jvp(lambda t: m(t)[0], (x,), (draw(3, 2, 3, seed=5),))[1]  # noqa: E731
    with torch.no_grad():
        torch.testing.assert_close(call(ours), call(theirs))


@pytest.mark.parametrize(
    "name", ["GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"]
)  # this CPU may have no LSTM of 16 bits
def test_autocast(name):
    """The same types as torch's, and products of 16 bits."""
    ours, theirs = (m.float() for m in pair(name))
    x = draw(2, 3).float() if "Cell" in name else draw(3, 2, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        a, b = flat(ours(x)), flat(theirs(x))
    for mine, wanted in zip(a, b, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=2e-2, atol=2e-2)


def test_the_op_is_torchs_kind():
    """Shapes without computing, and one op in an export."""
    given = [draw(*s).requires_grad_() for s in ((3, 2, 12), (12, 2), (2, 2), (2, 3), (12,), (2, 3))]
    args = (*given, torch.tensor([3, 1]), "lstm", True, True)
    torch.library.opcheck(_recurrent.library.forward, args, test_utils=("test_schema", "test_faketensor"))
    args = (*(draw(*s) for s in ((3, 2, 9), (9, 3), (2, 3))), *[None] * 4, "gru", False, True)
    torch.library.opcheck(_recurrent.library.forward, args, test_utils=("test_schema", "test_faketensor"))
    exported = torch.export.export(pair("GRU")[0], (draw(3, 2, 3),))
    named = [str(node.target) for node in exported.graph.nodes if "gpulayers" in str(node.target)]
    assert named == ["gpulayers.linear.default", "gpulayers.recurrent.default"]
    torch.testing.assert_close(exported.module()(draw(3, 2, 3))[0], pair("GRU")[1](draw(3, 2, 3))[0])


def test_compiled_whole():
    """Dynamo looks into recurrent modules where it is told to; the steps stay one op."""
    ours, theirs = pair("LSTM", bidirectional=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        same(torch.compile(ours, backend="aot_eager", fullgraph=True), theirs, draw(3, 2, 3), (), lambda x: x)


# --- layers of arrays -----------------------------------------------------------------------------------------------


def test_native_as_torchs():
    """Two layers in both directions, projected, of different lengths, from states of one's own."""
    theirs = pair("LSTM", num_layers=2, bidirectional=True, proj_size=2, batch_first=True)[1]
    mine = gl.LSTM(3, 4, 2, bidirectional=True, proj_size=2).to("float64")
    mine.load_state_dict(theirs.state_dict())
    given, lengths = [draw(3, 5, 3), *states_of(theirs, 3)], np.array([5, 2, 4])
    x, h, c = (t.clone().requires_grad_() for t in given)
    y, (h_n, c_n) = theirs(pack_padded_sequence(x, torch.tensor(lengths), True, False), (h, c))
    y, _ = pad_packed_sequence(y, True)
    (y.sin().sum() + h_n.cos().sum() + (2 * c_n).cos().sum()).backward()
    a, b, d = mine(*(t.numpy() for t in given), lengths)
    grads = mine.backward(np.cos(a), -np.sin(b), -2 * np.sin(2 * d))
    for ours, wanted in zip((a, b, d, *grads[:3]), (y, h_n, c_n, x.grad, h.grad, c.grad)):
        np.testing.assert_allclose(ours, wanted.detach().numpy(), rtol=1e-9, atol=1e-11)
    of_torch = dict(theirs.named_parameters())
    for name, w in mine.named_weights().items():
        np.testing.assert_allclose(w.grad, of_torch[name].grad.numpy(), rtol=1e-9, atol=1e-11)


def test_a_thousand_steps_do_not_drift():
    """float32 against torch in float64: no further than torch's own float32 is."""
    module, x = nn.LSTM(4, 8), draw(1000, 1, 4)
    truth = module.double()(x)[0]
    theirs = module.float()(x.float())[0]
    mine = gl.LSTM(4, 8)
    mine.load_state_dict({k: v.detach().numpy() for k, v in module.state_dict().items()})
    y = mine(np.ascontiguousarray(x.float().numpy().swapaxes(0, 1))).swapaxes(0, 1)
    error = lambda found: float((truth - found).detach().abs().max())  # noqa: E731
    assert error(torch.tensor(y)) <= 2 * error(theirs) + 1e-7
