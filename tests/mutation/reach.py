"""Which tests reach which function of a kernel, and how long they take: found once by watching them run."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from mutation import running
from mutation.mutant import KERNELS, Mutant

TESTS = Path(__file__).parents[1]
OFFSETS = ("test_huge.py", "test_long.py")
"""Of all kernels, with arrays of more than 2^31 elements."""
SHARED = ("test_far.py", "test_multiprocessors.py", "test_gaps.py", "test_sums.py", "test_special_values.py")
"""Of what kernels have in common."""
APART = ("test_gpu.py", "test_suite.py", "test_suite_order.py")
"""These need a GPU, or run the tests themselves."""
LIMIT = 3600.0


class Reach:
    """Tests by the functions they reach, kept on disk for each test file as it is."""

    def __init__(self, folder: Path, tree: Path):
        self.folder, self.tree = folder, tree
        self.found: dict[str, dict[str, tuple[float, set[str]]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, name: str) -> dict[str, tuple[float, set[str]]]:
        """The tests of a file that pass without a fault: their seconds of processor time, and what they reach."""
        if name not in self.found:
            text = (TESTS / name).read_bytes()
            kept = self.folder / f"{name}.{hashlib.sha256(text).hexdigest()[:12]}.json"
            if not kept.exists():
                tqdm.write(f"watching {name}, to know what its tests reach")
                found = running.run(self.tree, [f"tests/{name}"], LIMIT, tracing=True)
                broken = set(found["failed"])
                if found["by"]:
                    tqdm.write(f"left out, as they fail without a fault: {', '.join(broken) or found['by']}")
                tests = {t: [found["passed"][t], found["reached"][t]] for t in found["passed"] if t not in broken}
                kept.write_text(json.dumps(tests))
            self.found[name] = {t: (s, set(names)) for t, (s, names) in json.loads(kept.read_text()).items()}
        return self.found[name]

    def tests(self, mutant: Mutant) -> Iterator[list[str]]:
        """Those that may notice, a file after the other, the family's first: the quickest that reach the function, then,
        in its own file, the rest."""
        where = places(mutant)
        named = sorted(test_files(mutant.file), key=OFFSETS.__contains__, reverse=mutant.kind == "narrow")
        for name in dict.fromkeys([*named, *of_kernels()]):
            tests = self.of(name)
            near = [t for t, (_, names) in tests.items() if where(names)]
            far = [t for t in tests if t not in near] if _stem(mutant.file) == name[5:-3] else []
            if ordered := sorted(near, key=lambda t: tests[t][0]) + sorted(far, key=lambda t: tests[t][0]):
                yield ordered


def _stem(file: str) -> str:
    return Path(file).stem.lstrip("_")


def test_files(file: str) -> list[str]:
    """The tests of a kernel's file: its family's, or those of all the families that use a private file."""
    own = f"test_{_stem(file)}.py"
    if (TESTS / own).exists() and not Path(file).name.startswith("_"):
        return [own, *SHARED, *OFFSETS]
    families = [f"test_{p.stem}.py" for p in sorted(_users(KERNELS / file)) if not p.name.startswith("_")]
    return list(dict.fromkeys(name for name in (own, *families, *SHARED, *OFFSETS) if (TESTS / name).exists()))


@functools.cache
def of_kernels() -> list[str]:
    """All test files that check kernels, or train by their formulas."""
    checks = re.compile(r"\b(check_op|interpreting|emulating)\(|optimizer|Muon")
    found = [p for p in sorted(TESTS.glob("test_*.py")) if checks.search(p.read_text())]
    return [p.name for p in found if p.name not in APART and not p.name.startswith("test_torch_")]


def _users(path: Path) -> set[Path]:
    """The Python files that use a file, through others too."""
    if path.suffix == ".cuh":
        return {p for cu in path.parent.glob("*.cu") for p in _users(cu)}
    if path.suffix == ".cu":
        path = path.with_suffix(".py")
    used, new = {path}, {path}
    while new:
        new = {p for p in KERNELS.rglob("*.py") if new & _imports(p)} - used
        used |= new
    return used


@functools.cache
def _imports(path: Path) -> set[Path]:
    """The files of kernels that a kernel's file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = path.parents[node.level - 1]
            found |= {folder / f"{name}.py" for name in (node.module, *(a.name for a in node.names)) if name}
    return found


def places(mutant: Mutant):
    """Whether the functions that a test reached are those of the mutant."""
    if mutant.file.endswith(".cuh"):
        return lambda names: any(".cu:" in n for n in names)
    if mutant.file.endswith(".cu"):
        return lambda names: any(n.startswith(f"{mutant.file}:") for n in names)
    inner = _function(mutant)
    return lambda names: any(n.startswith(f"{mutant.file}:") and inner in (None, n.split(":")[1]) for n in names)


def _function(mutant: Mutant) -> str | None:
    """The function that a mutant lies in; None for code of the module and of a class."""
    functions = [n for n in ast.walk(ast.parse((KERNELS / mutant.file).read_bytes())) if isinstance(n, ast.FunctionDef)]
    inside = [n.name for n in functions if n.lineno <= mutant.line <= (n.end_lineno or 0)]
    return inside[-1] if inside else None  # outer ones come first
