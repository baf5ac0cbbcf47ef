"""A small GPT: the same by native layers and by torch, resumed bit for bit, and text that goes on."""

import dataclasses
import math

import numpy as np
import pytest

import gpulayers as gl
from gpulayers import cli, language
from gpulayers.language import _generate
from gpulayers.language._data import each_once, windows
from gpulayers.testing import check_layer

SMALL = language.Settings(context=16, width=16, layers=2, heads=2, epochs=3, steps=2, batch_size=4)
TEXT = language.read()


def trained(path, settings=SMALL, **how):
    return language.train(TEXT._replace(held_out=TEXT.held_out[:100]), str(path), settings, progress=False, **how)


@pytest.mark.parametrize("optimizer", language.OPTIMIZERS)
def test_native_and_torch_have_the_same_losses_step_by_step(tmp_path, optimizer):
    pytest.importorskip("torch")
    each = dataclasses.replace(SMALL, epochs=6, steps=1, optimizer=optimizer)
    native, torch = trained(tmp_path / "native", each), trained(tmp_path / "torch", each, torch=True)
    for name in ("loss", "val_loss", "lr"):
        # 2⁻²⁴ a rounding, √ of some hundred of them in a row, and each step's differences go into the next
        np.testing.assert_allclose(native["history"][name], torch["history"][name], rtol=1e-5)
    assert native["history"]["val_loss"][-1] < native["history"]["val_loss"][0]
    a, b = (gl.load(tmp_path / road / "model").state_dict() for road in ("native", "torch"))
    assert all(np.abs(a[name] - b[name]).max() < 1e-3 for name in a) and a.keys() == b.keys()


@pytest.mark.parametrize("torch, optimizer", [(False, "adamw"), (True, "muon")])
def test_interrupted_within_an_epoch_it_resumes_to_the_same_bits(tmp_path, monkeypatch, torch, optimizer):
    if torch:
        pytest.importorskip("torch")
    settings = dataclasses.replace(SMALL, optimizer=optimizer)
    whole = trained(tmp_path / "whole", settings, torch=torch)
    rate, called = language.Settings.rate, []

    def interrupted(self, step):
        called.append(step)
        if step == 3 and called.count(3) == 1:  # the second epoch's second step
            raise KeyboardInterrupt
        return rate(self, step)

    monkeypatch.setattr(language.Settings, "rate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut", settings, torch=torch)
    rest = trained(tmp_path / "cut", settings, torch=torch, resume=True)
    assert rest["history"]["loss"] == whole["history"]["loss"]
    a, b = (gl.load(tmp_path / road / "model").state_dict() for road in ("whole", "cut"))
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_other_settings_do_not_resume(tmp_path):
    trained(tmp_path, dataclasses.replace(SMALL, epochs=1))
    with pytest.raises(ValueError, match=r"settings of before; got lr 0\.003 → 0\.1"):
        trained(tmp_path, dataclasses.replace(SMALL, epochs=1, lr=0.1), resume=True)


def test_it_learns(tmp_path, capsys):
    """Letters in a row say which comes next: far below their 2.6 bits, from the command line to the text it writes."""
    (tmp_path / "rows.txt").write_text("abcdef" * 500)
    sizes = {"context": 8, "width": 16, "layers": 1, "heads": 2, "epochs": 2, "steps": 40, "batch-size": 8, "lr": 0.02}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    out = str(tmp_path / "run")
    assert cli.main(["train", "text", "--data", str(tmp_path / "rows.txt"), "--out", out, *options]) == 0
    said = capsys.readouterr().out
    assert float(said.split(" bits per character held out, after")[0].split()[-1]) < 0.5
    assert cli.main(["generate", out, "cdef", "--tokens", "14", "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "cdefabcdefabcdefab\n"


def test_what_is_read(tmp_path):
    (tmp_path / "b.txt").write_text("é" * 100)
    (tmp_path / "a.md").write_text("x" * 200)
    (tmp_path / "image").write_bytes(b"\xff\xd8\0")
    text = language.read(tmp_path)
    assert text.train.tobytes() + text.held_out.tobytes() == b"x" * 200 + b"\n" + "é".encode() * 100
    assert len(text.held_out) == 40 and text.per_character == 2
    assert language.bits(math.log(2), text) == pytest.approx(2)
    with pytest.raises(ValueError, match="the rule is a file of UTF-8 text"):
        language.read(tmp_path / "image")
    with pytest.raises(FileNotFoundError, match="not there"):
        language.read(tmp_path / "nothing")
    with pytest.raises(ValueError, match="more bytes than a context of 64 in each part; got 40"):
        language.train(text, str(tmp_path / "run"), dataclasses.replace(SMALL, context=64))
    assert not (tmp_path / "run").exists()
    assert 1 < TEXT.per_character < 1.01 and len(TEXT.train) + len(TEXT.held_out) > 400_000


def test_windows():
    x, y = windows(np.arange(10, dtype=np.uint8), 4)
    assert x.shape == y.shape == (6, 4) and (y == x + 1).all()
    x, y = each_once(np.arange(10, dtype=np.uint8), 4)
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]] and y[-1, -1] == 8


def test_tokens_are_drawn_by_their_shares():
    logits, random = np.log(np.array([0.1, 0.5, 0.15, 0.25])), np.random.default_rng(0)

    def shares(temperature=1.0, top_k=None, top_p=None):
        drawn = [_generate.drawn(logits, random, temperature, top_k, top_p) for _ in range(4000)]
        return np.bincount(drawn, minlength=4) / 4000

    np.testing.assert_allclose(shares(), [0.1, 0.5, 0.15, 0.25], atol=0.03)
    np.testing.assert_allclose(shares(top_k=2), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.74), [0, 2 / 3, 0, 1 / 3], atol=0.03)
    np.testing.assert_allclose(shares(top_p=0.01), [0, 1, 0, 0])
    flat = np.array([0.1, 0.5, 0.15, 0.25]) ** 0.5
    np.testing.assert_allclose(shares(temperature=2.0), flat / flat.sum(), atol=0.03)
    assert shares(temperature=0)[1] == 1


def test_reading_on_is_reading_all():
    """Each token's logits through the caches are those of its whole context, over the context's end, too."""
    model = SMALL.model().to("float64")
    tokens = TEXT.held_out[:40]
    reader, seen = _generate.Reader(model), 0
    for end in (5, *range(6, 41)):
        logits = reader.read(tokens[seen:end])
        x = reader.tokens[None].astype(np.int64)
        assert (x[0] == tokens[end - x.shape[1] : end]).all() and x.shape[1] <= SMALL.context
        np.testing.assert_allclose(logits, model(x)[0, -1], rtol=1e-5, atol=1e-6)
        seen = end
    assert {cache.used[0] for cache in reader.caches.values()} == {x.shape[1]}


@pytest.mark.parametrize(
    ("wrong", "said"), [({"temperature": -1}, "temperature ≥ 0"), ({"top_k": 0}, "top_k"), ({"top_p": 0}, "top_p")]
)
def test_values_that_generate_refuses(wrong, said):
    with pytest.raises(ValueError, match=said):
        next(language.generate(SMALL.model(), b"a", 1, **wrong))


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="the rule is a language model"):
        next(language.generate(gl.Sequential(gl.Linear(4, 4)), b"a", 1))


def test_its_layers():
    check_layer(language.PositionEmbedding(5), (None, 5, 3))
    loss, flat = language.NextTokenLoss(), gl.CrossEntropyLoss()
    x, target = np.random.default_rng(0).standard_normal((2, 3, 5)), np.array([[0, 4, 1], [2, 2, 3]])
    assert loss(x, target) == flat(x.reshape(6, 5), target.reshape(6))
    got, want = loss.backward(np.ones(())), flat.backward(np.ones(()))
    np.testing.assert_array_equal(got, want.reshape(x.shape))


def test_onnxruntime_computes_it(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = SMALL.model(), str(tmp_path / "gpt.onnx")
    model.export(path, format="onnx", input_shapes=[(None, SMALL.context)])
    session = onnxruntime.InferenceSession(path)
    x = TEXT.held_out[: 3 * SMALL.context].reshape(3, -1).astype(np.int64)
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    np.testing.assert_allclose(y, model(x), rtol=1e-5, atol=1e-5)
