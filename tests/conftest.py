"""Ends a run with what it proved: made from the kernels that ran and the ones that were audited, never written by hand."""

from __future__ import annotations

import compileall
import functools
import gc
import logging.handlers
import os
import pathlib
import py_compile
import sys

import pytest

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads, too; NumPy reads this once
os.environ.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # large pages: workers are a twentieth faster
os.fsync = lambda file: None  # no test is about a machine without power, and a thousand of them save a model


@pytest.fixture(autouse=True)
def _same_draws():
    import gpulayers as gl

    gl.random.seed(0)


@pytest.fixture(autouse=True)
def _one_thread():
    """torch draws the same each time. Its threads would wait for each other, where tests run side by side."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    _seed_what_is_there(torch)
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _seed_what_is_there(torch):
    """Of a GPU that is not there torch.manual_seed keeps the stack as text, for later: milliseconds, test for test."""
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        if not kind.is_available():
            kind.manual_seed_all = lambda seed: None


@pytest.fixture
def forgotten(monkeypatch):
    """Layers that a test registers are not registered after it."""
    from gpulayers.layers import _config

    monkeypatch.setattr(_config, "_registry", dict(_config._registry))


@pytest.fixture
def logged():
    """What the package's logger is told. (pytest's own way visits each of torch's loggers three times a test.)"""
    logger, handler = logging.getLogger("gpulayers"), logging.handlers.BufferingHandler(1000)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.buffer
    logger.setLevel(before)
    logger.removeHandler(handler)


@pytest.fixture
def driver(monkeypatch):
    """A GPU that does nothing, and no plans yet."""
    from gpulayers import dispatch
    from gpulayers.testing.null_driver import null_driver

    monkeypatch.setattr(dispatch, "_plans", {})
    with null_driver(compiled=False) as found:
        yield found


@pytest.fixture
def checkout(monkeypatch):
    """The package may be installed here; the GPU suite runs from this checkout."""
    from gpulayers.bench.suite import device_tests, suite

    for module in (suite, device_tests):
        monkeypatch.setattr(module, "ROOT", pathlib.Path(__file__).parents[1])


def _here() -> dict[str, list]:
    """What this process proved."""
    found = {}
    for part, module, name in (
        ("proven", "gpulayers.testing.interpreter", "proven"),
        ("emulated", "gpulayers.testing.emulator", "proven"),
        ("triton", "gpulayers.testing.arena", "on_gpu"),
        ("cuda", "gpulayers.kernels.cuda._launch", "launched"),
        ("compiled", "gpulayers.testing.audit_op", "compiled_for"),
        ("sizes", "gpulayers.testing._multiprocessors", "launched"),
        ("definitions", "gpulayers.testing.cupy_like", "ran"),
        ("held", "gpulayers.testing.check_op", "held"),
    ):
        found[part] = [list(map(str, item)) for item in getattr(sys.modules.get(module), name, ())]
    compared = getattr(sys.modules.get("gpulayers.testing.check_torch"), "compared", 0)
    return found | {"compared": [[str(os.getpid()), str(compared)]]}


def pytest_configure(config):
    """Python's bytecode once for all the processes of a run, where Python itself keeps none. Each compares it with the source."""
    if sys.dont_write_bytecode and not hasattr(config, "workerinput") and _is_whole(config):
        for folder in ("gpulayers", "kernels", "bench"):
            path = pathlib.Path(__file__).parents[1] / folder
            compileall.compile_dir(path, quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    gc.disable()  # modules and tests stay
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish():
    """What was imported and collected stays, and need not be looked through again: a tenth of the time went there."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["proofs"] = _here()
        return
    proofs = _all()
    session.config.proofs = proofs
    if session.exitstatus == 0 and _is_whole(session.config) and (unproven := _unproven(proofs)):
        session.config.unproven = unproven
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _is_whole(config) -> bool:
    """All tests were asked for, not a choice of them."""
    chosen = (
        config.option.keyword
        or config.option.markexpr
        or getattr(config.option, "lf", False)
        or config.option.maxfail == 1
    )
    return not chosen and config.args_source == pytest.Config.ArgsSource.TESTPATHS


def _unproven(proofs: dict[str, set]) -> list[str]:
    """Kernels that no test ran, that were not compiled, or that ran in one 16-bit type and not in the other; ops whose
    NumPy kernel refused every call; dtypes in which no test ran an op's definition on CuPy's terms."""
    from gpulayers.bench.suite import reach

    kernels = {backend: set(names) for backend, names in reach.kernels().items()}
    parts = {"triton": ("proven", "triton"), "cuda": ("emulated", "cuda")}
    wrong = []
    for backend, of in parts.items():
        ran: dict[str, set[str]] = {}
        for name, dtypes in (launch for part in of for launch in proofs.get(part, ())):
            for cell in reach.cells(backend, name, dtypes):
                _, kernel, dtype = cell.split()
                ran.setdefault(kernel, set()).add(dtype)
        wrong += [f"{k} was never run" for k in sorted(kernels[backend] - ran.keys())]
        for k in sorted(kernels[backend] & ran.keys()):
            half = ran[k] & {"float16", "bfloat16"}
            if len(half) == 1:
                wrong.append(f"{k} ran in {half.pop()} alone")
    compiled = {name for name, *_ in proofs.get("compiled", ())}
    wrong += [f"{k} was never compiled" for k in sorted(kernels["triton"] - compiled)]
    return (
        wrong
        + _refusing(proofs.get("held", set()))
        + _small(proofs.get("sizes", set()))
        + _unheld(proofs.get("definitions", set()))
    )


def _small(launched: set[tuple[str, str]]) -> list[str]:
    """Kernels whose launches depend on the number of multiprocessors, and were all made for a small GPU."""
    most: dict[str, int] = {}
    for kernel, multiprocessors in launched:
        most[kernel] = max(most.get(kernel, 0), int(multiprocessors))
    return [f"{k} was never launched as for a GPU of 132 multiprocessors" for k in sorted(most) if most[k] < 132]


def _refusing(held: set[tuple[str, str, str]]) -> list[str]:
    from gpulayers.inventory import backends_of, ops

    serving = {name for name, backend, _ in held if backend == "numpy"}
    names = [op.name for op in ops() if "numpy" in backends_of(op)]
    return [f"the NumPy kernel of {name} served no call" for name in names if name not in serving]


def _unheld(held: set[tuple[str, str]]) -> list[str]:
    from gpulayers import dispatch
    from gpulayers.arrays import FLOATS
    from gpulayers.inventory import ops

    wanted = [(op.name, str(dtype)) for op in ops() for dtype in FLOATS] if dispatch.installed("cuda") else []
    return [
        f"the definition of {name} never ran on CuPy's terms in {dtype}"
        for name, dtype in wanted
        if (name, dtype) not in held
    ]


def _all() -> dict[str, set]:
    proofs: dict[str, set] = {}
    for found in [_here(), *_from_workers]:
        for part, items in found.items():
            proofs.setdefault(part, set()).update(map(tuple, items))
    return proofs


_from_workers: list[dict] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _from_workers.append(getattr(node, "workeroutput", {}).get("proofs", {}))


def pytest_terminal_summary(terminalreporter):
    proofs = _all()
    write = terminalreporter.write_line
    if any(proofs.values()):
        terminalreporter.section("proven")
    for part, what in (
        ("triton", "Triton kernels run on the GPU"),
        ("cuda", "CUDA kernels run on the GPU"),
        ("proven", "Triton kernels interpreted on the CPU"),
        ("emulated", "CUDA kernels emulated on the CPU"),
    ):
        if items := proofs.get(part):
            dtypes = sorted({d for item in items for d in item[1].split() if "float" in d})
            write(f"{what} against their definitions: {len({i[0] for i in items})} ({', '.join(dtypes)})")
    if items := proofs.get("definitions"):
        write(f"definitions run on CuPy's terms: {len({name for name, _ in items})}")
    if items := proofs.get("compiled"):
        archs = ", ".join(f"sm_{a}" for a in sorted({int(i[2]) for i in items}))
        write(f"Triton kernels compiled and audited: {len({i[0] for i in items})} for {archs}")
    if compared := sum(int(n) for _, n in proofs.get("compared", ())):
        write(f"calls of drop-ins compared with torch's own: {compared}")
    for line in getattr(terminalreporter.config, "unproven", ()):
        terminalreporter.write_line(f"NOT PROVEN: {line}", red=True)
