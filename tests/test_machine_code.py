"""Every branch of every launcher compiles in its largest configuration for three architectures, within its budget: the
calls are the `audits()` of bench/<family>.py. (`gpulayers audit` compiles every configuration, for six.)"""

import importlib
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

from gpulayers.bench.cases.case import Case
from gpulayers.kernels._budget import Budget

from gpulayers.sweep import _calls, _plan, _results
from gpulayers.testing.emulator import kernel_names

FAMILIES = _calls.families()
KERNEL_FILES = [path for name in FAMILIES for path in _calls.family(name).triton] + _calls.shared_files()
CUDA = sorted(path.stem for path in _calls.kernels().glob("cuda/*.cu"))
EVERYWHERE = (80, 90, 100)


def audits(family: str) -> list[Case]:
    return importlib.import_module(f"gpulayers.bench.{family}").audits()


def runs() -> Iterator[tuple[str, str, int]]:
    """(family, dtype, architecture): float32 for all architectures where there are products, which have tiles of its own.
    float16's code is bfloat16's but for the conversions, so that one call is enough."""
    for family in FAMILIES:
        products = any(case.tf32 for case in audits(family))
        yield from ((family, "bfloat16", arch) for arch in EVERYWHERE)
        yield from ((family, "float32", arch) for arch in (EVERYWHERE if products else (80,)))
        yield family, "float16", 90


def planned(family: str, dtype: str, arch: int) -> _plan.Plan:
    # What is compiled for one architecture is so in one dtype.
    chosen = [c for c in audits(family) if arch in c.archs and (dtype == "bfloat16" or c.archs == EVERYWHERE)]
    chosen = chosen[:1] if dtype == "float16" else chosen
    plan = _plan.Plan()
    for call in _calls.calls(chosen, [dtype], layouts=False):
        if dtype != "float32" or call.tf32 or arch == 80:  # without TF32 no architecture has instructions of its own
            plan.add(call, arch)
    return plan


@pytest.mark.parametrize("family, dtype, arch", [*runs()])
def test_machine_code(family, dtype, arch):
    """No spills, 128 bits at a time where arrays are aligned, products in the tensor cores, budgets kept."""
    results, _ = _results.audited(planned(family, dtype, arch), processes=1)
    assert results
    assert [f"{r.kernel} {r.config} ({r.call}): {fault}" for r in results for fault in r.faults] == []


@pytest.mark.parametrize("arch", EVERYWHERE)
@pytest.mark.parametrize("stem", CUDA)
def test_machine_code_of_cuda(stem, arch):
    results = _results.audited_cuda(stem, arch, only="gelu" if stem == "activation" and arch != 90 else "")
    assert results and [f"{r.kernel}: {fault}" for r in results for fault in r.faults] == []


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.stem)
def test_every_kernel_has_a_budget(path):
    """Beside it, and no other kernel has."""
    module = importlib.import_module(f"gpulayers.kernels.triton.{path.stem}")
    budgets = getattr(module, "BUDGETS", {})
    assert [f"{path.stem}.{kernel}" for kernel in budgets] == _plan.kernels_in([path])
    assert all(isinstance(budget, Budget) and budget != Budget() for budget in budgets.values())


@pytest.mark.parametrize("stem", CUDA)
def test_every_cuda_kernel_has_a_budget(stem):
    """One pattern of names each, and each pattern names some."""
    from gpulayers.kernels.cuda import _launch

    budgets = importlib.import_module(f"gpulayers.kernels.cuda.{stem}").BUDGETS
    given = [_results.cuda_budget(kernel, budgets) for kernel in kernel_names(_launch.source(stem))]
    assert Budget() not in given and set(map(id, given)) == set(map(id, budgets.values()))
