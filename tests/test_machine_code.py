"""Every branch of every launcher compiles in its largest configuration for sm_90, every kernel for sm_80 and sm_100 too, within
its budget: the calls are the `audits()` of bench/<family>.py. (`gpulayers audit` compiles every configuration, for six.)"""

import functools
import importlib
import math
import operator
from collections.abc import Iterable, Iterator

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

from gpulayers.bench.cases.case import Case
from gpulayers.kernels._budget import Budget

from gpulayers.sweep import _calls, _plan, _results
from gpulayers.testing.compiling import Planned
from gpulayers.testing.emulator import kernel_names

FAMILIES = _calls.families()
KERNEL_FILES = [path for name in FAMILIES for path in _calls.family(name).triton] + _calls.shared_files()
CUDA = sorted(path.stem for path in _calls.kernels().glob("cuda/*.cu"))
EVERYWHERE = (80, 90, 100)
PARTS = {
    ("activation", 80): "gelu",
    ("activation", 100): "gelu",
    ("recurrent", 80): "bfloat16",
    ("recurrent", 90): "float32",
    ("recurrent", 100): "float16",
    ("pooling", 80): "bfloat16",
    ("pooling", 90): "float32",
    ("pooling", 100): "float16",
}
"""Of files with many copies of a kernel, what is compiled here, on sm_90 what test_launch_cuda.py needs, too. (`gpulayers
audit` compiles them whole.)"""


def audits(family: str) -> list[Case]:
    return importlib.import_module(f"gpulayers.bench.{family}").audits()


def products(family: str) -> bool:
    """Its code differs most among architectures: each has tensor cores of its own."""
    return any(case.tf32 for case in audits(family))


def dtypes(family: str, arch: int) -> Iterator[str]:
    """float16's code is bfloat16's but for the conversions, so that one product is enough, and pooling's volumes, which
    lack registers."""
    yield "bfloat16"
    if products(family) or arch != 90:
        yield "float32"
    if family in ("linear", "pooling") and arch == 90:
        yield "float16"


def planned(family: str, dtype: str, arch: int) -> dict[str, _plan.Job]:
    """Of all calls in bfloat16 on sm_90, and half of them in float32 where TF32 gives it instructions of its own; what is
    compiled for one architecture is so in bfloat16. For the others see ``elsewhere``."""
    if dtype == "float16" and family == "pooling":
        chosen = [c for c in audits(family) if c.name.startswith("volumes")]
    elif dtype == "float16":
        chosen = [c for c in audits(family) if c.archs == EVERYWHERE][:1]
    elif arch == 90 and dtype == "float32":
        chosen = [c for c in audits(family) if c.archs == EVERYWHERE][::2]
    elif arch == 90:
        chosen = [c for c in audits(family) if arch in c.archs]
    else:
        chosen = [call for call, own in elsewhere(family, arch) if own == dtype]
    plan = _plan.Plan()
    for call in _calls.calls(chosen, [dtype], layouts=False):
        if (dtype, arch) != ("float32", 90) or call.tf32:
            plan.add(call, arch)
    return plan.jobs if arch == 90 else richest(plan.jobs.values())


def richest(jobs: Iterable[_plan.Job]) -> dict[str, _plan.Job]:
    """Of each kernel, in each precision of its products, the binary with most arguments and the largest tiles."""
    found: dict[tuple, _plan.Job] = {}
    for job in sorted(jobs, key=lambda job: riches(job.launch)):
        found[job.launch.kernel, job.launch.constants.get("PRECISION")] = job
    return {job.launch.key: job for job in found.values()}


def riches(launch: Planned) -> tuple[int, int]:
    tiles = math.prod(v for v in launch.constants.values() if type(v) is int and v > 1)
    return len(launch.source.fn.arg_names) - len(launch.constants), tiles


@functools.cache
def elsewhere(family: str, arch: int) -> list[tuple[Case, str]]:
    """(call, dtype) on sm_80 or sm_100: each takes half of the calls, bfloat16 and float32 in turn, and of the others'
    those that bring a kernel (what is compiled of them: ``richest``); of a family of up to three calls all, the only one of a
    family in both dtypes."""
    everywhere, own = ([c for c in audits(family) if (c.archs == EVERYWHERE) is all_of] for all_of in (True, False))
    alone = [(c, "bfloat16") for c in own if arch in c.archs]
    each = [(c, "float32" if i % 2 == (arch == 100) else "bfloat16") for i, c in enumerate(everywhere)]
    if len(everywhere) <= 3:
        both = [(c, dtype) for c in everywhere for dtype in ("bfloat16", "float32")]
        return alone + (both if len(everywhere) == 1 else each)
    found = [pair for i, pair in enumerate(each) if (i % 4 < 2) == (arch == 80)]
    known = set().union(*(kernels_of(*pair, arch) for pair in (*found, *alone)))
    for pair in each:
        if more := kernels_of(*pair, arch) - known:
            found.append(pair)
            known |= more
    return found + alone


def kernels_of(case: Case, dtype: str, arch: int) -> set[str]:
    plan = _plan.Plan()
    for call in _calls.calls([case], [dtype], layouts=False):
        plan.add(call, arch)
    return {job.launch.kernel for job in plan.jobs.values()}


@pytest.mark.parametrize("arch", EVERYWHERE)
@pytest.mark.parametrize("family", FAMILIES)
def test_machine_code(family, arch):
    """No spills, 128 bits at a time where arrays are aligned, products in the tensor cores, budgets kept."""
    found = [planned(family, dtype, arch) for dtype in dtypes(family, arch)]
    assert all(found)
    results, _ = _results.audited(_plan.Plan(functools.reduce(operator.or_, found)), processes=1)
    assert [f"{r.kernel} {r.config} ({r.call}): {fault}" for r in results for fault in r.faults] == []


@pytest.mark.parametrize("arch", EVERYWHERE)
@pytest.mark.parametrize("stem", CUDA)
def test_machine_code_of_cuda(stem, arch):
    results = _results.audited_cuda(stem, arch, PARTS.get((stem, arch), ""))
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
