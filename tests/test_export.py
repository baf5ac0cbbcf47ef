"""What cannot be exported is said before a byte is written, and what is there already is never lost."""

import errno
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from npm import linked, node, node_modules

import gpulayers as gl
from gpulayers import cli


class Clipped(gl.Layer):
    """It asks for a value, which a recording does not have."""

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        self.save(x)
        return x if float(x.max()) < 1 else x / 2

    def backward(self, dy):
        return dy


class Dense(gl.Layer):
    """A name that TensorFlow.js has for a layer of its own."""

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        return -x

    def backward(self, dy):
        return -dy


class Größe(gl.Layer):
    """A name that JavaScript's registry and model.json would not keep."""

    def output_shape(self, input_shape):
        return input_shape

    def forward(self, x):
        return 3 * x

    def backward(self, dy):
        return 3 * dy


def small(*layers: gl.Layer) -> gl.Sequential:
    model = gl.Sequential(gl.Linear(4, 4), *layers)
    model.ensure_built((None, 4))
    return model


def files(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_every_layer_in_the_way_is_listed(tmp_path):
    with pytest.raises(gl.ExportError) as error:
        small(gl.ReLU(), Clipped(), gl.Residual(gl.Tanh(), Clipped())).export(tmp_path / "out")
    assert [(r.place, r.layer) for r in error.value.refusals] == [("2", "2.Clipped"), ("3.1", "1.Clipped")]
    assert str(error.value).count("return x if float(x.max()) < 1 else x / 2") == 2
    assert "2.Clipped (at 2): test_export.py:" in str(error.value) and not list(tmp_path.iterdir())


def test_a_weight_that_is_not_a_number(tmp_path):
    model = small()
    model[0].weight[1, 2] = np.nan
    with pytest.raises(
        gl.ExportError, match=r"0\.Linear \(at 0\): 0\.weight is not a number \(NaN\) at 1 of 16 places"
    ):
        model.export(tmp_path / "out")
    model[0].weight[1, 2] = np.inf  # which is one
    model.export(tmp_path / "out")


def test_a_weight_of_two_layers(tmp_path):
    model = small(gl.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(gl.ExportError, match=r"0\.weight is one weight of several layers"):
        model.export(tmp_path / "out")


def test_a_shape_that_is_not_known(tmp_path):
    model = gl.Sequential(gl.ReLU())
    with pytest.raises(RuntimeError, match="Sequential: export needs the input's shape: call the model once, or give"):
        model.export(tmp_path / "out")
    with pytest.raises(ValueError, match="the rule is sizes that are known, but for the batch's"):
        model.export(tmp_path / "out", input_shapes=[(None, None)])
    for shapes in ((None, 4), [4], [()]):
        with pytest.raises(
            ValueError, match=r"Sequential: export: the rule is a shape for each input, as \[\(None, 8\)\]"
        ):
            model.export(tmp_path / "out", input_shapes=shapes)
    for format in ("tfjs", "onnx"):
        with pytest.raises(
            ValueError, match=r"Linear: export: it takes no inputs of the shapes \[\(None, 4\), \(None, 4\)\]"
        ):
            gl.Linear(4, 2).export(tmp_path / "out", format=format, input_shapes=[(None, 4)] * 2)
    with pytest.raises(ValueError, match=r"format: the rule is one of .*; got 'h5'"):
        model.export(tmp_path / "out", format="h5")
    assert not list(tmp_path.iterdir())


def test_another_folder_is_left_alone(tmp_path):
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(
        FileExistsError, match=r"the rule is a new folder, or one with an exported model; it holds pack"
    ):
        small().export(tmp_path)
    assert files(tmp_path) == {"package.json": b"{}"}
    with pytest.raises(FileExistsError, match="is a file"):
        small().export(tmp_path / "package.json")


def test_an_earlier_export_is_replaced(tmp_path, monkeypatch):
    """… its weight files too, however many there were; what npm and the user put there stays."""
    monkeypatch.setattr("gpulayers.export.tfjs._weights.SHARD", 32)
    small().export(tmp_path)
    assert len(list(tmp_path.glob("*.bin"))) == 3
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "input.json").write_text("[]")
    monkeypatch.undo()
    small().export(tmp_path)
    assert [p.name for p in tmp_path.glob("*.bin")] == ["group1-shard1of1.bin"]
    assert (tmp_path / "node_modules").is_dir() and (tmp_path / "input.json").read_text() == "[]"


@pytest.mark.parametrize("full_after", [0, 2, 5])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, full_after):
    old, new = tmp_path / "old", tmp_path / "new"
    small().export(old)
    before, write, left = files(old), pathlib.Path.write_bytes, [full_after] * 2

    def full(path, data):
        which = path.is_relative_to(new)
        left[which] -= 1
        if left[which] < 0:
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    for folder in (old, new):
        with pytest.raises(OSError, match="No space left"):
            small().export(folder)
    assert files(old) == before and not new.exists()


def test_names_that_are_not_plain(tmp_path, monkeypatch):
    """Of folders, classes and layers: files are as they were named, TF.js gets names that it can load.

    And weights come back in order, however the files are cut.
    """
    monkeypatch.setattr("gpulayers.export.tfjs._weights.SHARD", 30)
    model = small(Größe(), gl.Linear(4, 2), Dense())
    model[2].name = "der Ausgang №1 ß"
    folder = tmp_path / "mein Modell – ü"
    model.export(folder)
    described = json.loads((folder / "model.json").read_text("utf-8"))
    names = [layer["name"] for layer in described["modelTopology"]["model_config"]["config"]["layers"]]
    assert names == ["input", "Linear_0", "Groe_1", "der_Ausgang_No1", "Dense_3"]
    classes = (folder / "custom_layers.js").read_text("utf-8")
    assert "class Groe extends" in classes and "class DenseLayer extends" in classes
    linked(folder, node_modules("@tensorflow/tfjs"))
    (folder / "input.json").write_text("[[1, 2, 3, 4]]")
    (folder / "short.json").write_text("[[1, 2, 3]]")
    (folder / "half.json").write_text("[[1, 2, 0.5, 4]]")
    (folder / "ragged.json").write_text("[[1, 2, 3, 4], [1]]")
    y = np.array(json.loads(node("predict.mjs", "input.json", cwd=folder)))
    assert np.allclose(y, model(np.float32([[1, 2, 3, 4]])), atol=1e-5)
    done = subprocess.run(["node", "predict.mjs", "short.json"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == "predict.mjs: short.json: the rule is the shape [rows,4]; got [1,3]\n"
    shard = folder / "group1-shard1of4.bin"
    shard.write_bytes(shard.read_bytes()[:-4])
    done = subprocess.run(["node", "predict.mjs", "input.json"], cwd=folder, capture_output=True, text=True)
    assert done.stderr == "predict.mjs: group1-shard1of4.bin …: the rule is 120 bytes of weights; got 116\n"
    read = "try { read(file, [{shape: [null, 4], dtype: 'float32'}], 'inputs') } catch (error) { console.log(error.message) }"
    code = f"import {{read}} from './predict.mjs'; for (const file of ['ragged.json', 'no.json']) {read}"
    code += f"; for (const file of ['half.json']) {read.replace('float32', 'int32')}"
    ragged, missing, half = node("--input-type=module", "-e", code, cwd=folder).splitlines()
    assert half == "half.json: the rule is integers; got 0.5"
    assert ragged == "ragged.json: the rule is nested lists of numbers, equally long; got [1]"
    assert missing.startswith("no.json: ENOENT: no such file")


LAYER = """
import gpulayers as gl

@gl.register
class Twofold(gl.Layer):
    def output_shape(self, input_shape):
        return input_shape
    def forward(self, x):
        return 2 * x
    def backward(self, dy):
        return 2 * dy
"""


def test_the_command_exports_layers_of_ones_own(tmp_path, capsys, forgotten):
    (tmp_path / "twofold.py").write_text(LAYER)
    make = "from twofold import gl, Twofold; m = gl.Sequential(gl.Linear(4, 2), Twofold()); gl.save(m, 'model')"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path, check=True)
    command = ["export", str(tmp_path / "model"), "--out", str(tmp_path / "the app")]
    assert cli.main(command) == 2
    assert "Twofold is not registered here: import the module that has it under @gl.register" in capsys.readouterr().err
    command += ["--layers", str(tmp_path / "twofold.py")]
    assert cli.main(command) == 2 and "export needs the input's shape" in capsys.readouterr().err
    assert cli.main([*command, "--input-shape", "1,4"]) == 0
    assert f"\ncd '{tmp_path}/the app' && npm install\n" in capsys.readouterr().out
    assert "class Twofold" in (tmp_path / "the app/custom_layers.js").read_text()


class Elsewhere(gl.ReLU):
    """It is read as another layer."""

    def exported(self) -> gl.Layer:
        return gl.Hardtanh(0, np.inf)


def test_what_a_layer_says_is_exported_in_its_place(tmp_path):
    small(Elsewhere()).export(tmp_path)
    assert "class Elsewhere extends tf.layers.Layer" in (tmp_path / "custom_layers.js").read_text()


def test_a_table_of_words_is_tfjs_own(tmp_path):
    """Its input is integers; TF.js trains every row, so that one of padding is refused."""
    model = gl.Sequential(gl.Embedding(5, 3), gl.Flatten(), gl.Linear(12, 2))
    model.export(tmp_path / "site", input_shapes=[(None, 4)])
    layers = json.loads((tmp_path / "site" / "model.json").read_text())["modelTopology"]["model_config"]["config"][
        "layers"
    ]
    assert [layer["class_name"] for layer in layers[:2]] == ["InputLayer", "Embedding"]
    assert layers[0]["config"]["dtype"] == "int32"
    with pytest.raises(gl.ExportError, match="Embedding"):
        gl.Sequential(gl.Embedding(5, 3, padding_idx=1)).export(tmp_path / "no", input_shapes=[(None, 4)])
