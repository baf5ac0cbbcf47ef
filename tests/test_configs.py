"""Tables of configurations: whole, well formed, and what launches choose by."""

import contextlib
import json
import pathlib

import pytest

pytest.importorskip("triton")

from gpulayers.bench.cases.uses import declare
from gpulayers.bench.softmax import cases
from gpulayers.kernels.triton import _configs, _matmul, _tables, _tile, softmax
from gpulayers.kernels.triton._tables import Row, Tile

from gpulayers.arrays import bfloat16
from gpulayers.testing.audit_op import _launch
from gpulayers.testing.compiling import one
from gpulayers.testing.gpus import GPUS

ROOT = pathlib.Path(__file__).parents[1]
H100 = _tile.Device(90, 132, 232448)


@pytest.fixture(autouse=True)
def every_launcher():
    """All choices are declared, and no test's table outlives it."""
    declare()
    yield
    _configs.reload()


def shipped(arch=80) -> dict:
    return json.loads((ROOT / f"kernels/configs/sm_{arch}.json").read_text())


# --- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", GPUS)
def test_every_choice_has_entries_for_every_gpu(arch):
    table = _tables.read(_tables.find(arch))
    assert set(table.entries) == set(_configs.CHOICES)
    for name, choice in _configs.CHOICES.items():
        assert choice.entries(arch) == table.entries[name]


def test_a_gpu_without_a_table_takes_the_nearest():
    nearest = {arch: _tables.find(arch).name for arch in (80, 86, 87, 89, 90, 100, 103, 120, 121)}
    assert [a for a, name in nearest.items() if name == "sm_90.json"] == [90, 100, 103]
    assert {name for name in nearest.values()} == {"sm_80.json", "sm_90.json"}


@pytest.mark.parametrize("path", sorted((ROOT / "kernels/configs").glob("*.json")), ids=lambda p: p.stem)
def test_a_table_is_written_one_entry_a_line(path):
    table = _tables.read(path)
    assert _tables.text(table) == path.read_text() and path.stem == f"sm_{table.arch}"
    assert list(table.entries) == sorted(table.entries)


def test_a_folder_of_your_own_comes_first(tmp_path, monkeypatch):
    """For its architectures; the others keep the shipped tables. It is read once, and anew after reload."""
    raw = shipped()
    raw["choices"]["glu_forward"]["rows"][0]["warps"] = 8
    (tmp_path / "sm_80.json").write_text(json.dumps(raw))
    ampere, hopper = _tile.Device(86, 84, 101376), H100
    choice = _configs.CHOICES["glu_forward"]
    assert choice(ampere, 64).warps == 4
    monkeypatch.setenv("GPULAYERS_CONFIGS", str(tmp_path))
    assert choice(ampere, 64).warps == 4
    _configs.reload()
    assert (choice(ampere, 64).warps, choice(hopper, 64).warps) == (8, 4)
    monkeypatch.setenv("GPULAYERS_CONFIGS", str(tmp_path / "nowhere"))
    _configs.reload()
    with pytest.raises(ValueError, match=r"GPULAYERS_CONFIGS names a folder of tables; '.*nowhere' is none"):
        choice(ampere, 64)


WRONG = {
    "not JSON": (lambda raw: "{", r"sm_80\.json: a table of configurations is a JSON file"),
    "no arch": (lambda raw: raw.pop("arch"), "has the keys arch, made and choices .*, not made, choices"),
    "made of numbers": (lambda raw: raw.update(made=3), "made a text, not 80 and 3"),
    "no entries": (lambda raw: raw["choices"]["dropout"].update(rows=[]), "dropout: there is at least one entry"),
    "both kinds": (
        lambda raw: raw["choices"]["dropout"].update(tiles=[]),
        "dropout: a choice has a list named rows or tiles",
    ),
    "block": (lambda raw: first(raw, elements=1000), "entry 0: elements is a power of two from 32 to 32768, not 1000"),
    "warps": (lambda raw: first(raw, warps=3), "softmax_forward: entry 0: warps is a power of two from 1 to 32, not 3"),
    "true": (lambda raw: first(raw, warps=True), "warps is a power of two from 1 to 32, not True"),
    "upto": (
        lambda raw: first(raw, upto=9000),
        r"upto grows from entry to entry, null last; not \[9000, 8192, 32768\]",
    ),
    "early end": (lambda raw: first(raw, upto=None), "upto grows from entry to entry"),
    "no length": (lambda raw: first(raw, upto=0), "upto is a whole number from 1"),
    "keys": (
        lambda raw: first(raw, stages=2),
        "entry 0: it has the keys upto, elements, warps, not upto, elements, warps, s",
    ),
    "stages": (
        lambda raw: raw["choices"]["matmul.half"]["tiles"][1].update(stages=0),
        "matmul.half: entry 1: stages is a whole number from 1 to 8, not 0",
    ),
    "measured": (
        lambda raw: raw["choices"]["dropout"].update(measured={"gpu": "H100"}),
        "dropout: measured has the keys gpu, driver, triton, date, gain, not gpu",
    ),
    "gain": (
        lambda raw: raw["choices"]["dropout"].update(measured=dict.fromkeys(_tables.MEASURED, "x")),
        "dropout: measured: gain is a number, not 'x'",
    ),
}


def first(raw: dict, **fields) -> None:
    raw["choices"]["softmax_forward"]["rows"][0].update(fields)


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_table_is_refused_by_name(fault, tmp_path):
    change, message = WRONG[fault]
    path, raw = tmp_path / "sm_80.json", shipped()
    text = change(raw)
    path.write_text(text if isinstance(text, str) and fault == "not JSON" else json.dumps(raw))
    with pytest.raises(ValueError, match=message) as caught:
        _tables.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda c: c.pop("glu_forward"),
            r"sm_90\.json: glu_forward: a table has every choice, and this one is missing",
        ),
        (
            lambda c: c.update(glu_forward={"rows": [{"upto": 64, "elements": 64, "warps": 1}]}),
            "glu_forward: entry 0: upto of the last entry is null, for rows of any length",
        ),
        (lambda c: c.update(glu_forward=c["matmul.half"]), "glu_forward: its entries are Row, not Tile"),
    ],
    ids=["missing", "short", "kind"],
)
def test_what_a_launcher_cannot_use_is_refused(change, message, tmp_path, monkeypatch):
    raw = shipped(90)
    change(raw["choices"])
    (tmp_path / "sm_90.json").write_text(json.dumps(raw))
    monkeypatch.setenv("GPULAYERS_CONFIGS", str(tmp_path))
    _configs.reload()
    with pytest.raises(ValueError, match=message):
        _configs.CHOICES["glu_forward"](H100, 64)


def test_a_row_held_in_registers_ends_somewhere():
    with pytest.raises(ValueError, match="softmax_forward: entry 0: upto of the last entry is a length"):
        softmax.FORWARD.check("here: softmax_forward", (Row(None, 2048, 4),))


# --- choosing --------------------------------------------------------------------------------------------------------


def launched(case, **forced) -> list[tuple[str, dict]]:
    """The launches of a case on an H100, with these choices forced."""
    found = []

    def note(kernel, grid, *args, **options):
        found.append((kernel.fn.__name__, options))

    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tile, "launch", note)
        patch.setattr(_tile, "pretend", one(90))
        for name, config in forced.items():
            stack.enter_context(_configs.forced(name, config))
        _launch(case.op, case.specs(bfloat16), case.wanted(), case.options, False)
    return found


def test_forced_holds_whatever_the_shape():
    case = cases()[0]._replace(shapes=((64, 5000),))
    (_, before), _ = launched(case)
    (_, forced), (_, untouched) = launched(case, softmax_forward=Row(8, 16384, 2))
    (walked, _), _ = launched(case, softmax_forward=None)
    assert (before["ROWS"], before["num_warps"]) == (1, 8) == (untouched["ROWS"], untouched["num_warps"])
    assert (forced["ROWS"], forced["BLOCK"], forced["num_warps"]) == (2, 8192, 2)
    assert walked == "_softmax_forward_looped_kernel"
    assert launched(case)[0][1] == before


@pytest.mark.parametrize(
    "name, config, message",
    [
        ("softmax", Row(None, 64, 4), "no launcher declares the choice 'softmax'; there are"),
        ("softmax_forward", Row(None, 100, 4), "forced: softmax_forward: entry 0: elements is a power of two"),
        ("softmax_forward", Tile(64, 64, 64, 4, 3), "forced: softmax_forward takes a Row, not Tile"),
        ("glu_forward", None, "forced: glu_forward takes a Row, not None"),
    ],
)
def test_forced_refuses_what_no_table_may_hold(name, config, message):
    with pytest.raises(ValueError, match=message), _configs.forced(name, config):
        pass


def test_a_forced_tile_that_does_not_fit_is_refused():
    small = _tile.Device(86, 84, 101376)
    with (
        _configs.forced("matmul.half", Tile(256, 256, 128, 8, 4)),
        pytest.raises(ValueError, match=r"matmul\.half: none of"),
    ):
        _matmul.HALF(small, 4096, 4096, 4096, 2, True, False)
    assert _matmul.HALF(small, 4096, 4096, 4096, 2, True, False) == (Tile(128, 256, 32, 8, 4), 1)


def test_listed_entries_stand_for_the_table():
    """By the choice's own rule; what no table may list is refused."""
    with _configs.listed("softmax_forward", [Row(64, 128, 1), Row(4096, 4096, 2)]):
        assert [softmax.FORWARD(H100, n) for n in (64, 65, 5000)] == [(2, 64, 1), (32, 128, 2), None]
    assert softmax.FORWARD(H100, 64) == (32, 64, 4)
    wrong = pytest.raises(ValueError, match="listed: glu_forward: entry 0: upto of the last entry is null")
    with wrong, _configs.listed("glu_forward", [Row(64, 128, 1)]):
        pass


def test_asked_lists_what_launches_chose():
    """Chosen anew or remembered, it is listed; and rows too long for every entry have no index."""
    case = cases()[0]._replace(shapes=((64, 20000),))
    launched(case)
    with _configs.asked() as found:
        launched(case)
    device = one(90)
    assert found == [
        ("softmax_forward", (device, 20000), 2),
        ("softmax_backward", (device, 20000), None),
        ("softmax_backward.walked", (device, 20000), 0),
    ]
    launched(case)
    assert len(found) == 3


def test_what_was_chosen_is_remembered():
    """A launch reads no table and applies no rule a second time."""
    calls = []
    choice = softmax.FORWARD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice, "rule", lambda *a, rule=choice.rule: calls.append(a) or rule(*a))
        assert choice(H100, 77777) is None and choice(H100, 77) == choice(H100, 77) == (16, 128, 4)
        choice(H100, 77777)
    assert len(calls) == 2
