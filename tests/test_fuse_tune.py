"""What is measured of fused kernels: a search on seconds that are a known function of the choice, and who takes it up."""

import json

import pytest

pytest.importorskip("torch")
from fused_layers import Centred, Masked, Swish
from gpulayers.bench.measuring.device import Cpu
from gpulayers.bench.tuning import fused
from test_fuse import SWISH, arrays_for, cache  # noqa: F401

from gpulayers import arrays, cli
from gpulayers.fusing import _measured, fusion
from gpulayers.fusing._launch import Tile, tiles
from gpulayers.testing import check_op
from gpulayers.testing.audit_op import launchers
from gpulayers.testing.compiling import planning
from gpulayers.testing.interpreter import interpreting


class Model(fused.Lab):
    """Seconds follow from the tile that a direction's first kernel is launched with, and from what is saved."""

    gpu = "stand-in"

    def __init__(self, seconds, wrong=lambda launch: False):
        self.seconds, self.wrong = seconds, wrong

    def launches(self, case, direction):
        """What one direction, or both, would launch on a GPU, and what forward saves."""
        forward, backward = launchers(case.op, case.specs(), () if direction == "forward" else case.wanted(), {})
        with planning(90) as session:
            _, saved = forward()
            first = len(session.planned)
            if direction != "forward":
                backward(saved)
        return session.planned[first if direction == "backward" else 0 :], saved

    def check(self, case, dtype):
        return "wrong" if any(map(self.wrong, self.launches(case, "both")[0])) else None

    def capture(self, case, dtype, direction):
        found, saved = self.launches(case, direction)
        return lambda: self.seconds(found, saved)


@pytest.fixture
def here(monkeypatch):
    monkeypatch.setattr(_measured, "gpu", lambda: "stand-in")


def fewest_rows(launches, saved):
    return float(launches[0].constexprs["ROWS"])


def test_the_fastest_is_found_and_taken_up(here):
    layer, said = Centred(), []
    before = fusion(layer, (None, 40))
    best = fused.Search(layer, [(12, 40)], arrays.float32, Model(fewest_rows), said.append).run()
    (tile,) = best.forward.values()
    assert tile.rows == min(t.rows for t in tiles(before.kernels[before.forward], 40)) and best.gain > 1
    after = fusion(layer, (None, 40))
    assert after is not before and "Measured on stand-in" in after.text and after.choice == best
    with interpreting() as session:
        check_op(after.op, *arrays_for(layer, (12, 40)), backends=["triton"], dtypes=["float32"], dys=["dense"])
    first = next(launch for launch in session.launches if launch.kernel == "centred_forward")
    assert first.constexprs["ROWS"] == tile.rows
    with interpreting() as session:  # of another size nothing is known
        check_op(after.op, *arrays_for(layer, (3, 40)), backends=["triton"], dtypes=["float32"], dys=["dense"])
    first = next(launch for launch in session.launches if launch.kernel == "centred_forward")
    assert first.constexprs["ROWS"] != tile.rows


def test_what_is_saved_is_measured(here):
    """Where reading y again is slow, backward computes it."""
    import gpulayers as gl

    layer = gl.Softmax(-1)
    model = Model(lambda launches, saved: 2.0 if "y" in saved else 1.0)
    best = fused.Search(layer, [(4, 8)], arrays.float32, model, lambda text: None).run()
    assert best.saving == "nothing" and best.gain == 2
    op = fusion(layer, (None, 8)).op
    assert op.rule(arrays.Spec((2, 8), arrays.float32), needs=("x",)).saved.keys() == {"x"}


def test_a_wrong_candidate_is_left_out_and_no_gain_is_not_kept(here):
    layer, said = Swish(), []
    model = Model(fewest_rows, wrong=lambda launch: launch.constexprs["ROWS"] < 64)
    best = fused.Search(layer, [(4, 8)], arrays.float32, model, said.append).run()
    assert all(tile.rows >= 64 for tile in best.forward.values()) and any("left out: wrong" in line for line in said)
    same = fused.Search(Swish(), [(4, 16)], arrays.float32, Model(lambda *_: 1.0), said.append).run()
    assert same.gain == 1 and said[-1] == "what counted bytes chose stays"
    assert _measured.read(fusion(Swish(), (None, 16)).key) is None


def test_the_harness_checks_and_times(here):
    """On this CPU, which runs what kernels are held against; an op that draws included."""
    lab = fused.Harness(Cpu(turn=0.0, settle=0.0, large=1 << 12), "definition")
    case = fused.Search(Masked(), [(4, 8)], arrays.float32, lab)._case(_measured.Choice("nothing"))
    assert lab.check(case, arrays.float32) is None
    assert all(lab.capture(case, arrays.float32, direction)() > 0 for direction in ("forward", "backward", "both"))


def test_another_gpu_and_a_broken_file(here, monkeypatch):
    choice = _measured.Choice("nothing", {9: Tile(1, 8, 4)}, {}, "stand-in", "2026-01-01", 1.5)
    path = _measured.write("some_key", choice)
    _measured.write("some_key", choice._replace(gpu="another"))
    assert _measured.read("some_key") == choice and set(json.loads(path.read_text())) == {"stand-in", "another"}
    monkeypatch.setattr(_measured, "gpu", lambda: "a third")
    assert _measured.read("some_key") is None
    path.write_text('{"a third": {"saving": 3}}')
    with pytest.raises(ValueError, match=r"some_key\.json: a third: the rule is"):
        _measured.read("some_key")
    path.write_text("{")
    with pytest.raises(ValueError, match=r"some_key\.json: the rule is a JSON file"):
        _measured.read("some_key")


def test_from_a_shell_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(_measured, "gpu", lambda: None)
    assert cli.main(["tune", SWISH, "--input-shape", "64,8"]) == 2
    assert "counted bytes choose" in capsys.readouterr().err
    assert cli.main(["tune", SWISH]) == 2 and "--input-shape" in capsys.readouterr().err
