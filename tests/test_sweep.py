"""`gpulayers audit`: each seeded fault is flagged by name, what no case reaches too, and a second run compiles nothing."""

import argparse
import json
import pathlib
import shutil
import subprocess

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

import triton
import triton.language as tl
from gpulayers.bench.cases.case import Case
from gpulayers.kernels._budget import Budget
from gpulayers.kernels.triton import _configs, _tables

from gpulayers import cli
from gpulayers.arrays import Spec, bfloat16
from gpulayers.definition import Rule
from gpulayers.ops._op import Op
from gpulayers.sweep import _calls, _plan, _results, audit
from gpulayers.sweep._show import changes
from gpulayers.testing.audit import Report
from gpulayers.testing.audit_op import audit_op
from gpulayers.testing.check_op import CheckError

ROOT = pathlib.Path(__file__).parents[1]


@triton.jit
def _softmax_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + tl.program_id(0) * n + i, i < n, float("-inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    tl.store(y + tl.program_id(0) * n + i, (e / tl.sum(e, 0)).to(y.dtype.element_ty), i < n)


@triton.jit
def _shifted_kernel(x, y, n, BLOCK: tl.constexpr):
    """Reads one element further on, so that no 128 bits are aligned."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i + 1, i + 1 < n, 0.0), i < n)


@triton.jit
def _product_kernel(x, y, n, BLOCK: tl.constexpr, WIDENED: tl.constexpr):
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    a = tl.load(x + i * BLOCK + j)
    if WIDENED:
        out = tl.dot(a.to(tl.float32), a.to(tl.float32), input_precision="ieee")
    else:
        out = tl.dot(a, a)
    tl.store(y + i * BLOCK + j, out.to(y.dtype.element_ty))


@triton.jit
def _forgotten_kernel(x):
    tl.store(x, 0.0)


BUDGETS = {"_softmax_kernel": Budget(registers=64, blocks=4)}


def case(kernel, shape, warps=4, grid=1, **constants):
    """A family's case: y = kernel(x), which only compiles."""

    class Kernels:
        @staticmethod
        def toy_forward(x, *, needs=(), empty):
            y = empty(x.shape, x.dtype)
            kernel[(grid,)](x, y, x.shape[-1], **constants, num_warps=warps)
            return (y,), {}

    def toy_rule(x, *, needs=()):
        return Rule({"y": x.like()})

    def toy_forward(x, *, needs=()):
        raise NotImplementedError

    return Case(Op(toy_rule, toy_forward, kernels={"triton": Kernels}), kernel.fn.__name__, (shape,))


def run(cases, tmp_path, capsys, files=(), **options):
    """(the command's exit status, its faults, its whole output)."""
    given = {
        "family": [],
        "arch": "sm_90",
        "dtype": "bfloat16",
        "all": True,
        "diff": None,
        "json": tmp_path / "out.json",
    }
    family = _calls.Family("toy", cases, list(files), [])
    status = audit(argparse.Namespace(**given | options), [family])
    out = capsys.readouterr().out
    return status, [line for line in out.splitlines() if line.startswith("FAULT")], out


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("GPULAYERS_CACHE", str(tmp_path / "cache"))


SOUND = case(_softmax_kernel, (8, 1024), BLOCK=1024)


def test_a_sound_kernel_and_a_second_run(tmp_path, capsys):
    """The second run calls no compiler: its line says so, by a count."""
    status, faults, out = run([SOUND, SOUND], tmp_path, capsys)
    assert (status, faults) == (0, []) and "1 kernels, 1 binaries: 1 compiled now, 0 known" in out
    assert "test_sweep._softmax_kernel" in out and "sm_90" in out and "BLOCK=1024" in out
    (result,) = _results.read(tmp_path / "out.json").results
    assert (
        result.figures["loads"] == 128
        and result.figures["widths"].startswith("loads 128×")
        and result.figures["bound"]
        and result.figures["spills"] == 0
    )
    status, _, out = run([SOUND], tmp_path, capsys, all=False)
    assert status == 0 and "0 compiled now, 1 known" in out


def test_a_seeded_spill(tmp_path, capsys):
    """And so many registers are beyond the budget, as are so few blocks."""
    status, faults, _ = run([case(_softmax_kernel, (8, 32768), BLOCK=32768)], tmp_path, capsys)
    assert status == 1 and all(line.startswith("FAULT test_sweep._softmax_kernel for sm_90: ") for line in faults)
    assert [f"{what}" for what in ("spills: ", "registers a thread; its budget is 64", "its budget is 4") for f in faults if what in f] == [
        "spills: ", "registers a thread; its budget is 64", "its budget is 4"
    ]  # fmt: skip


def test_a_seeded_unaligned_access(tmp_path, capsys):
    status, faults, _ = run([case(_shifted_kernel, (8, 1024), BLOCK=1024)], tmp_path, capsys)
    assert status == 1 and "_shifted_kernel for sm_90: none of its" in faults[0] and "global loads" in faults[0]


def test_rows_that_begin_anywhere_may_be_read_narrowly(tmp_path, capsys):
    assert run([case(_shifted_kernel, (8, 1023), BLOCK=1024)], tmp_path, capsys)[0] == 0


def test_seeded_lost_tensor_cores(tmp_path, capsys):
    kept, lost = (case(_product_kernel, (32, 32), BLOCK=32, WIDENED=widened) for widened in (False, True))
    status, faults, _ = run([kept], tmp_path, capsys)
    assert (status, faults) == (0, [])
    status, faults, _ = run([kept, lost], tmp_path, capsys)
    assert status == 1 and len(faults) == 1
    assert "_product_kernel for sm_90: multiplies 16-bit or TF32 matrices without tensor-core" in faults[0]
    assert "WIDENED=True" in faults[0]


def test_a_kernel_that_does_not_compile(tmp_path, capsys):
    """It is a fault of its own; what shares its batch is reported all the same."""
    status, faults, out = run([case(_shifted_kernel, (8, 1023), BLOCK=1000), SOUND], tmp_path, capsys)
    assert status == 1 and len(faults) == 1 and "_shifted_kernel for sm_90: does not compile: " in faults[0]
    assert "test_sweep._softmax_kernel" in out


def test_a_kernel_that_no_case_reaches(tmp_path, capsys):
    path = pathlib.Path(__file__)
    kernels = {
        f"test_sweep.{k.fn.__name__}" for k in (_softmax_kernel, _shifted_kernel, _product_kernel, _forgotten_kernel)
    }
    assert set(_plan.kernels_in([path])) == kernels
    status, faults, _ = run([SOUND], tmp_path, capsys, files=[path])
    assert status == 1 and "FAULT test_sweep._forgotten_kernel: no case launches it" in faults


def test_entries_of_tables_that_no_case_chooses_are_forced(monkeypatch):
    """On calls that ask for that choice, and whose rows the entry is for; without any it is a fault."""
    monkeypatch.setattr(_configs, "CHOICES", {})
    monkeypatch.setattr(_configs, "_tables_read", {})
    choice, tiles = _configs.rows("toy"), _configs.tiles("toy_tiles", lambda entries, device: (0, entries[0]), (16,))
    rows = (_configs.Row(64, 64, 1), _configs.Row(1024, 1024, 4), _configs.Row(None, 2048, 4))
    two = (_configs.Tile(16, 16, 16, 1, 1), _configs.Tile(32, 32, 32, 1, 1))
    table = _tables.Table(pathlib.Path("sm_90.json"), 90, "here", {"toy": rows, "toy_tiles": two}, {})
    monkeypatch.setattr(_tables, "find", lambda arch: table.path)
    monkeypatch.setattr(_tables, "read", lambda path: table)
    taken = []

    class Kernels:
        @staticmethod
        def toy_forward(x, *, needs=(), empty):
            device = _configs_device(x)
            taken.append((choice(device, x.shape[-1]).elements, tiles(device).BM))
            y = empty(x.shape, x.dtype)
            _shifted_kernel[(1,)](x, y, x.shape[-1], BLOCK=64)
            return (y,), {}

    def _configs_device(x):
        from gpulayers.kernels.triton import _tile

        return _tile.device(x)

    plain = case(_shifted_kernel, (8, 512), BLOCK=64)
    op = plain.op
    op.kernels["triton"] = Kernels
    plan = _plan.Plan()
    for call in _calls.calls([plain], ["bfloat16"]):
        plan.add(call, 90)
    assert taken == [(1024, 16)]
    plan.force(90)
    assert taken == [(1024, 16), (1024, 32)]  # no row is as short, or as long, as the other entries are for
    missing = _plan.unreached(plan, [90], [], whole=True)
    assert [line.split(":")[2][:26] for line in missing] == [" no case is for entry 0, R", " no case is for entry 2, R"]


def result(kernel="k", config="BLOCK=1", **figures):
    return _results.Result(kernel, config, "float32", 90, figures)


def test_changes():
    """Between two audits: figures, binaries that came and that went."""
    before = _results.Sweep(
        [result(registers=96, spills=0), result("gone", registers=1), result("same", registers=3)], []
    )
    after = _results.Sweep(
        [result(registers=112, spills=12), result("new", registers=2), result("same", registers=3)], []
    )
    text, count = changes(before, after)
    assert count == 3 and "registers 96 → 112; spills 0 → 12" in text and "same" not in text
    assert [line.split()[3] for line in text.splitlines()[2:]] == ["gone", "changed", "added"]


def test_diff_with_another_commit(tmp_path, capsys):
    """There, dropout had other tiles; and a commit before that had no audit at all."""
    repository = tmp_path / "repository"
    (repository / "gpulayers").mkdir(parents=True)

    def commit(message):
        git = ("git", "-C", str(repository), "-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run([*git[:3], "init", "-q"], check=True)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", message], check=True)

    commit("before")
    for folder in ("gpulayers", "kernels", "bench"):
        shutil.copytree(
            ROOT / folder,
            repository / folder,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("results", "__pycache__"),
        )
    table = repository / "kernels/configs/sm_90.json"
    content = json.loads(table.read_text())
    content["choices"]["dropout"]["rows"][0]["elements"] *= 4
    table.write_text(json.dumps(content))
    commit("other tiles")
    options = {"family": ["dropout"], "arch": "sm_90", "dtype": "bfloat16", "all": False, "json": None}
    assert audit(argparse.Namespace(**options, diff="HEAD"), root=repository) == 0
    out = capsys.readouterr().out
    assert "gone" in out and "added" in out and "dropout._dropout_kernel" in out
    with pytest.raises(ValueError, match="HEAD~1 has no `gpulayers audit` yet"):
        audit(argparse.Namespace(**options, diff="HEAD~1"), root=repository)
    with pytest.raises(ValueError, match="git gives no 'nothing'"):
        audit(argparse.Namespace(**options, diff="nothing"), root=repository)


def test_one_call_of_an_op_of_your_own():
    (report,) = audit_op(SOUND.op, Spec((8, 1024), bfloat16), archs=(90,))
    assert report.kernel == "_softmax_kernel" and report.loads == 128
    with pytest.raises(CheckError, match=r"(?s)toy \(.*_shifted_kernel for sm_90 .*none of its \d+ global loads"):
        audit_op(case(_shifted_kernel, (8, 1024), BLOCK=1024).op, Spec((8, 1024), bfloat16), archs=(90,))


def test_what_binds_the_blocks_of_a_multiprocessor():
    def bound(registers=32, shared=0, warps=4):
        report = Report("k", 90, warps, registers, 0, 0, shared, 10, {})
        return report.blocks_per_sm, report.bound

    assert bound(registers=255) == (2, "registers") and bound(shared=100_000) == (2, "shared memory")
    assert bound(warps=32) == (2, "registers") and bound(registers=16, warps=32) == (2, "warps")
    assert bound(registers=16, warps=1) == (32, "blocks")


def test_a_cuda_kernel_beyond_its_budget(monkeypatch):
    """Figures and dtypes come from its binary and its name, threads and limits from the budget beside its launcher."""
    from gpulayers.kernels.cuda import norm

    pytest.importorskip("cupy_backends")
    found = {(r.kernel, r.dtypes, r.config): r for r in _results.audited_cuda("norm", 90)}
    result = found["cuda/norm.layer_norm_forward", "bfloat16 float32", "packs threads=512"]
    assert result.faults == [] and result.figures["loads"] == 128 and result.figures["shared"] > 4 * norm.CACHED
    budget = norm.BUDGETS["layer_norm_forward_*"]._replace(registers=8, blocks=4)
    monkeypatch.setitem(norm.BUDGETS, "layer_norm_forward_*", budget)
    faults = [f for r in _results.audited_cuda("norm", 90) for f in r.faults if r.key == result.key]
    assert ["its budget is 8" in faults[0], "its budget is 4" in faults[1]] == [True, True]


def test_errors(capsys):
    for arguments, text in (
        (["softmaxx"], "audit: no family 'softmaxx'; there are activation, "),
        (["--arch", "sm_75"], "--arch: the rule is some of sm_80, "),
        (["--dtype", "int8"], "--dtype: the rule is some of bfloat16, "),
    ):
        assert cli.main(["audit", *arguments]) == 2
        assert text in capsys.readouterr().err
