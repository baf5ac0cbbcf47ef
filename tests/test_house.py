"""The house: arrows run one way, families are whole, names agree in every room, and it installs as it stands."""

import ast
import functools
import graphlib
import importlib
import inspect
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from typing import NamedTuple

import pytest

from gpulayers.inventory import families, ops
from gpulayers.ops._op import Op

ROOT = pathlib.Path(__file__).parents[1]
INSTALLED = {"gpulayers": "gpulayers", "kernels": "gpulayers/kernels", "bench": "gpulayers/bench"}
FAMILIES = families()
OPS = list(ops())
LEVELS = [  # what a module may import stands below it
    {"__main__"},
    {"cli"},
    {"sweep"},
    {"demo", "bench", "authoring", "language"},
    {"train", "testing"},
    {"torch"},
    {"fusing"},
    {"export"},
    {"layers", "inventory"},
    {"random"},
    {"ops"},
    {"dispatch"},
    {"launch"},
    {"transfer"},
    {"definition", "_lookups"},
    {"arrays", "_console", "_files", "_named", "_policy", "_table", "_taps"},
]


def rooms() -> dict[str, int]:
    return {"gpulayers": 0} | {name: level for level, names in enumerate(LEVELS) for name in names}


class Import(NamedTuple):
    """`from module import names`, or `import module` without names."""

    module: str
    names: tuple[str, ...]
    level: int
    for_types: bool


class Source(NamedTuple):
    imports: list[Import]
    called: list[str]
    """What is called when the file is imported."""
    reasons: list[str]
    """Texts that functions named `…refuses` return."""


@functools.cache
def read(path: pathlib.Path) -> Source:
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    checks = [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.dump(n.test)]
    for_types = {id(part) for check in checks for inside in check.body for part in ast.walk(inside)}
    imports = [Import(a.name, (), 0, id(n) in for_types) for n in nodes if isinstance(n, ast.Import) for a in n.names]
    for n in nodes:
        if isinstance(n, ast.ImportFrom):
            imports.append(Import(n.module or "", tuple(a.name for a in n.names), n.level, id(n) in for_types))
    at_import = [n for n in tree.body if isinstance(n, ast.Assign | ast.AnnAssign | ast.Expr)]
    called = [ast.unparse(c.func) for n in at_import for c in ast.walk(n) if isinstance(c, ast.Call)]
    refusing = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name.endswith("refuses")]
    returned = [c for f in refusing for r in ast.walk(f) if isinstance(r, ast.Return) for c in ast.walk(r)]
    reasons = [c.value for c in returned if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    return Source(imports, called, reasons)


def imported(path: pathlib.Path) -> set[str]:
    """The rooms of gpulayers that a file imports, inside functions too; imports for type checkers do not count."""
    found = set()
    for module, names, level, for_types in read(path).imports:
        if not (level or for_types):
            full = [f"{module}.{name}" for name in names] if names and module == "gpulayers" else [module]
            found |= {n.split(".")[1] if "." in n else "gpulayers" for n in full if n.split(".")[0] == "gpulayers"}
    return found


def sources(*folders: str) -> list[pathlib.Path]:
    return [p for f in folders for p in sorted((ROOT / f).rglob("*.py"))]


INSIDE = [
    p for p in sources("gpulayers") if p != ROOT / "gpulayers/__init__.py"
]  # there the public names come together


def test_arrows_run_one_way():
    wrong = []
    for path in INSIDE:
        room = path.relative_to(ROOT / "gpulayers").parts[0].removesuffix(".py")
        level = rooms()[room]
        for other in imported(path) - {room, "kernels"}:
            if other == "gpulayers":  # only the top may import the package itself
                right = level <= rooms()["demo"]
            else:
                right = rooms()[other] > level or (room, other) == ("testing", "train")
            if not right:
                wrong.append(f"{path}: {room} imports {other}")
    assert not wrong


def module(path: pathlib.Path) -> str:
    """The name that a file is imported by."""
    room, *inside = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([INSTALLED[room].replace("/", "."), *inside]).removesuffix(".__init__")


def test_no_module_imports_itself_in_a_circle():
    """Imports inside functions and for type checkers count, too: each file can be read after those that it names."""
    files = {module(p): p for p in sources(*INSTALLED)}
    graph: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found = graph.setdefault(name, set())
        for imported_name, names, level, _ in read(path).imports:
            origin = importlib.util.resolve_name("." * level + imported_name, package)
            whole = {f"{origin}.{each}" for each in names}
            found |= whole & files.keys() or {origin}
    tops = {"gpulayers"}  # the public names come from everywhere; only the top may ask for them
    known = {name: (found & files.keys()) - {name} - tops for name, found in graph.items() if name not in tops}
    graphlib.TopologicalSorter(known).prepare()  # CycleError shows the circle


def test_files_are_short():
    """A file that has more than 500 lines is two."""
    lines = {path: path.read_text().count("\n") for path in sources(*INSTALLED, "tests", "examples")}
    assert not {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > 500}


def test_kernels_import_nothing_above_them():
    above = {path: imported(path) - {"arrays", "_lookups", "_named", "_taps"} for path in sources("kernels")}
    assert not {path: names for path, names in above.items() if names}


BENCH_ROOMS = ["models", "cases", "judging", "measuring", "reporting", "tuning", "suite"]
"""Each may import those before it."""


@pytest.mark.parametrize("path", sources("bench"), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way_in_bench(path):
    """A family's file needs cases alone; only what a user starts may import everything."""
    inside = path.relative_to(ROOT / "bench").parts
    found = re.findall(r"^ *from (?:gpulayers\.bench\.?|\.)(\w*)[\w.]* import", path.read_text(), re.M)
    if len(inside) > 1:
        assert set(found) <= set(BENCH_ROOMS[: BENCH_ROOMS.index(inside[0]) + 1])
    elif inside[0] not in ("run.py", "report.py", "own.py"):
        assert set(found) <= {"cases"}


def test_no_star_imports_and_no_device_queries_at_import():
    wrong = []
    for path in sources("gpulayers", "kernels", "bench"):
        file = read(path)
        wrong += [f"{path}: from {i.module} import *" for i in file.imports if "*" in i.names]
        asked = [c for c in file.called if ("cuda" in c and "is_available" in c) or "get_device" in c]
        wrong += [f"{path}: {call}" for call in asked]
    assert not wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_family_is_whole(family):
    """Every family has its file in every room (optimizers' ops have no backward: they stand in train, not in layers)."""
    needed = ["kernels/triton/{}.py", "tests/test_{}.py", "bench/{}.py"]
    needed += (
        []
        if all(op.backward is None for op in OPS if op.family == family)
        else ["gpulayers/layers/{}.py", "gpulayers/torch/{}.py"]
    )
    missing = [p.format(family) for p in needed if not (ROOT / p.format(family)).is_file()]
    assert not missing


INFERENCE = {"attention_decode", "batch_moments", "grad_norm", "one_hot"}
"""Ops that have no backward although they update nothing."""


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_names_and_signatures_agree(op: Op):
    module = importlib.import_module(f"gpulayers.ops.{op.family}")
    assert getattr(module, op.name) is op
    assert op.__doc__, f"{op.name} has no docstring"
    assert [f.__name__ for f in (op.rule, op.forward)] == [f"{op.name}_rule", f"{op.name}_forward"]
    assert (op.backward is None) == (op.name in INFERENCE or bool(op.updates and not op.differentiable))
    for backend in ("triton", "cuda", "aten", "numpy"):
        path = f"gpulayers.kernels.{backend}.{op.family}"
        if importlib.util.find_spec(path) is None:
            continue
        kernels = importlib.import_module(path)
        assert hasattr(kernels, f"{op.name}_forward") or backend != "triton", f"{op.name} has no Triton kernel"
        for definition in filter(None, (op.forward, op.backward)):
            launcher = getattr(kernels, definition.__name__, None)
            if launcher is None:
                assert not hasattr(kernels, f"{op.name}_forward"), f"{backend}: {op.name} lacks one direction"
                continue
            wanted = set(inspect.signature(definition).parameters) | (
                {"empty"} if backend in ("triton", "cuda") else set()
            )
            assert set(inspect.signature(launcher).parameters) == wanted, f"{backend}.{definition.__name__}"


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_rule_docs_and_bench(op: Op):
    """Every op is benchmarked: its family's cases name it."""
    bench = importlib.import_module(f"gpulayers.bench.{op.family}")
    assert any(case.op is op for case in bench.cases()), f"bench/{op.family}.py has no case for {op.name}"


def test_refusals_are_committed():
    """What a GPU kernel refuses, under which condition and why, stands in kernels/REFUSALS.md."""
    found = []
    for backend in ("triton", "cuda", "aten", "numpy"):
        for family in FAMILIES:
            path = f"gpulayers.kernels.{backend}.{family}"
            if importlib.util.find_spec(path) is not None:
                reasons = getattr(importlib.import_module(path), "REFUSALS", {})
                found += [f"| {backend} | {family} | {why} |" for why in reasons.values()]
    text = (ROOT / "kernels/REFUSALS.md").read_text()
    listed = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| backend")]
    assert listed == found, "kernels/REFUSALS.md must list:\n" + "\n".join(found)


def test_reasons_for_refusing_are_listed():
    """A refusal's text comes from the file's REFUSALS, so that the committed list has it."""
    assert not {path: texts for path in sources("kernels") if (texts := [t for t in read(path).reasons if " " in t])}


def run(*command: str, cwd: pathlib.Path, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_is_light(tmp_path):
    """`import gpulayers` loads NumPy, and no torch, triton, cupy, tqdm, safetensors or matplotlib; from a bare checkout."""
    heavy = ["torch", "triton", "cupy", "tqdm", "safetensors", "matplotlib", "sklearn"]
    code = f"import sys, gpulayers; print([m for m in {heavy} if m in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT)).strip() == "[]"


def test_bare_checkout(tmp_path):
    """PYTHONPATH alone serves kernels and benchmarks too."""
    code = "import gpulayers as gl; from gpulayers.kernels.numpy import _blocks; from gpulayers.bench.cases import case"
    run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))


LEFT_OUT = {"bench/results", "kernels/REFUSALS.md"}
"""What readers of the repository want, and no program."""


def shipped() -> set[pathlib.PurePosixPath]:
    """What a wheel must hold: the files of the rooms that install."""
    found = set()
    for room, target in INSTALLED.items():
        for path in (p.relative_to(ROOT) for p in (ROOT / room).rglob("*") if p.is_file()):
            inside = "__pycache__" not in path.parts and path.suffix != ".pyc"
            if inside and LEFT_OUT.isdisjoint(map(str, (path, *path.parents))):
                found.add(pathlib.PurePosixPath(target, *path.parts[1:]))
    return found


def test_every_folder_is_declared():
    """In pyproject.toml, as a package: one that is not would be missing from a wheel."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(declared) == declared == sorted({".".join(p.parent.parts) for p in shipped()})


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[pathlib.Path, str]:
    """A wheel of this tree, and what its build said. Of a copy: an older build in the tree would add its files."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    for room in INSTALLED:
        shutil.copytree(ROOT / room, tree / room, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    command = ["-m", "pip", "wheel", str(tree), "--no-deps", "--no-build-isolation", "-v", "-w", str(folder)]
    said = run(sys.executable, *command, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


def test_wheel_has_one_top_level_module(built, tmp_path):
    """And in it what the tree has: no file less, none more."""
    names = {n for n in zipfile.ZipFile(built[0]).namelist() if ".dist-info/" not in n}
    assert names == set(map(str, shipped()))
    zipfile.ZipFile(built[0]).extractall(tmp_path / "site")
    for command in ("info", "explain conv --shapes 1,3,8,8 4,3,3,3"):  # it works where nothing but the wheel is
        run(sys.executable, "-m", "gpulayers.cli", *command.split(), cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))


def test_wheel_is_built_without_a_warning(built):
    """Setuptools warns of a folder with data that is no declared package, and will leave it out one day."""
    assert not re.findall(r".*\w*Warning: .*", built[1])


def test_ruff():
    run(sys.executable, "-m", "ruff", "check", ".", cwd=ROOT)
    run(sys.executable, "-m", "ruff", "format", "--check", ".", cwd=ROOT)


def test_mypy():
    run(sys.executable, "-m", "mypy", cwd=ROOT, MYPY_CACHE_DIR=os.environ.get("MYPY_CACHE_DIR", ".mypy_cache"))
