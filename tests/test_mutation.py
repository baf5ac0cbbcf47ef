"""Faults seeded in kernels: what ``mutate.py`` makes are faults, and those it calls equal still stand in the kernels."""

import ast
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent


@pytest.fixture
def mutant(monkeypatch):
    """The module that makes faults; the tests' folder is not a package."""
    monkeypatch.syspath_prepend(str(TESTS))
    from mutation import mutant

    yield mutant
    for name in [name for name in sys.modules if name.split(".")[0] == "mutation"]:
        del sys.modules[name]


def together(text, faults):
    """A file with several faults, as far as they stand apart."""
    end = len(text)
    for m in sorted(faults, key=lambda m: m.start, reverse=True):
        if m.end <= end:
            text, end = text[: m.start] + m.new + text[m.end :], m.start
    return text


def test_faults_are_code(mutant):
    """Every one changes one place, and leaves a file of Python that can be read; no comment changes."""
    for file in mutant.files([]):
        found = mutant.every(file)
        assert found or "__init__" in file or file.endswith(("_blas.py", "_tracing.py")), file
        some = found[:: max(1, len(found) // 10)]
        assert not any(m.before.startswith(("#", "//", '"')) for m in some), file
        if file.endswith(".py"):
            ast.parse(together((mutant.KERNELS / file).read_bytes(), some))
        assert all("\n-" in m.diff() and "\n+" in m.diff() for m in found[:1])


def test_equal_faults_stand_in_the_kernels(mutant):
    """Each entry says why, and its line is there: what has changed must be judged again."""
    for (file, before, after), why in mutant.equal().items():
        lines = {" ".join(line.split()) for line in (mutant.KERNELS / file).read_text().splitlines()}
        assert before in lines and after != before and why, f"{file}: {before}"


def test_kept_faults_can_be_seeded(mutant):
    """Their lines are there, and so are the tests that notice them."""
    for name in ("sample", "reported"):
        for m, test in mutant.kept(name):
            file, function = test.split("[")[0].split("::")
            assert f"def {function}(" in (TESTS.parent / file).read_text(), test
            assert m.applied() != (mutant.KERNELS / m.file).read_bytes()


def test_a_sample_is_noticed():
    """Twenty faults of every backend, each on one test; `mutate.py` seeds others."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "mutate.py"), "--kept", "sample"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "20 of 20 faults noticed" in done.stdout, done.stdout + done.stderr


def test_a_seed_gives_the_same_faults():
    def drawn(seed: str) -> str:
        command = [
            sys.executable,
            str(TESTS / "mutate.py"),
            "--list",
            "--count",
            "3",
            "--seed",
            seed,
            "--family",
            "softmax",
        ]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    first = drawn("1")
    assert first.count("@@ -") == 3 and first == drawn("1") != drawn("2")
