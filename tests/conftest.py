"""Ends a run with what it proved: made from the kernels that ran and the ones that were audited, never written by hand."""

from __future__ import annotations

import pytest

PARTS = ("proven", "compiled")


@pytest.fixture(autouse=True)
def _same_draws():
    import gpulayers as gl

    gl.random.seed(0)


def _here() -> dict[str, list]:
    """What this process proved."""
    import sys

    found = {}
    for part, module, name in (
        ("proven", "gpulayers.testing.interpreter", "proven"),
        ("emulated", "gpulayers.testing.emulator", "proven"),
        ("triton", "gpulayers.testing.arena", "on_gpu"),
        ("cuda", "gpulayers.kernels.cuda._launch", "launched"),
        ("compiled", "gpulayers.testing.audit_op", "compiled_for"),
    ):
        found[part] = [list(map(str, item)) for item in getattr(sys.modules.get(module), name, ())]
    return found


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["proofs"] = _here()


_from_workers: list[dict] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _from_workers.append(getattr(node, "workeroutput", {}).get("proofs", {}))


def pytest_terminal_summary(terminalreporter):
    proofs: dict[str, set] = {}
    for found in [_here(), *_from_workers]:
        for part, items in found.items():
            proofs.setdefault(part, set()).update(map(tuple, items))
    write = terminalreporter.write_line
    terminalreporter.section("proven")
    for part, what, required in (
        ("triton", "Triton kernels run on the GPU", False),
        ("cuda", "CUDA kernels run on the GPU", False),
        ("proven", "Triton kernels interpreted on the CPU", True),
        ("emulated", "CUDA kernels emulated on the CPU", True),
    ):
        items = proofs.get(part, set())
        dtypes = sorted({d for item in items for d in item[1].split() if "float" in d})
        if items or required:
            write(f"{what} against their definitions: {len({i[0] for i in items})} ({', '.join(dtypes)})")
    items = proofs.get("compiled", set())
    archs = sorted({int(i[2]) for i in items})
    write(
        f"Triton kernels compiled and audited: {len({i[0] for i in items})} for {', '.join(f'sm_{a}' for a in archs)}"
    )
    never = {i[0] for i in proofs.get("proven", ())} ^ {i[0] for i in items}
    if never and items and len(terminalreporter.stats.get("passed", ())) > 300:
        write(f"only interpreted, or only compiled: {', '.join(sorted(never))}")
