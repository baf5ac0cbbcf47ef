"""Audits families of ops: one ``Result`` for each kernel, configuration, dtypes and architecture."""

from __future__ import annotations

import fnmatch
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpulayers.kernels._budget import Budget
from gpulayers.sweep import _compile
from gpulayers.sweep._calls import Family, calls
from gpulayers.sweep._plan import Job, Plan, title, unreached
from gpulayers.testing.audit import Report
from gpulayers.testing.audit_op import judge
from gpulayers.testing.compiling import Planned

SHOWN = (
    *("registers", "spills", "shared", "blocks_per_sm", "bound", "loads", "stores", "tensor_core", "bulk"),
    "widths",
)
"""The figures of a report that a result has, by ``Report``'s names."""


@dataclass
class Result:
    """One binary and its figures (those of ``SHOWN``); none if it did not compile."""

    kernel: str
    """``<file>.<kernel>``."""
    config: str
    dtypes: str
    arch: int
    figures: dict[str, Any] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    call: str = ""
    """A call that launches it."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.kernel, self.config, self.dtypes, self.arch


@dataclass
class Sweep:
    """What an audit found."""

    results: list[Result]
    unreached: list[str]
    """Kernels and entries of tables that no case reaches."""
    compiled: int = 0
    """Kernels compiled for it; the others' reports were on disk."""

    @property
    def faults(self) -> list[str]:
        """In words, each with its kernel and what launches it; the same fault of several configurations once."""
        grouped: dict[str, list[Result]] = {}
        for r in self.results:
            for fault in r.faults:
                grouped.setdefault(f"{r.kernel} for sm_{r.arch}: {fault}", []).append(r)
        more = {True: "", False: " and {} more"}
        lines = [
            f"{text} ({rs[0].call}; {rs[0].config}{more[len(rs) == 1].format(len(rs) - 1)})"
            for text, rs in grouped.items()
        ]
        return lines + self.unreached

    def write(self, path: Path) -> None:
        """As JSON."""
        content = {"results": [asdict(r) for r in self.results], "unreached": self.unreached}
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def read(path: Path) -> Sweep:
    """What ``Sweep.write`` wrote. ValueError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Sweep([Result(**r) for r in content["results"]], content["unreached"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no results of an audit: {error}") from None


def sweep(
    families: Sequence[Family],
    runs: Mapping[int, Sequence[str]],
    shared: Sequence[Path] = (),
    whole: bool = True,
    processes: int | None = None,
) -> Sweep:
    """Audit families for architectures, each in some dtypes.

    shared: files of kernels that belong to no one family. whole: all families and architectures are there, so
    every choice of the tables must be asked for. processes: that compile; by default one for each processor.
    """
    plan = Plan()
    for arch, dtypes in runs.items():
        todo = [call for family in families for call in calls(family.cases, dtypes)]
        for call in tqdm(todo, desc=f"launching for sm_{arch}", unit=" calls", leave=False):
            plan.add(call, arch)
        plan.force(arch)
    results, compiled = audited(plan, processes)
    stems = dict.fromkeys(stem for family in families for stem in family.cuda)
    for arch, stem in tqdm([(a, s) for a in runs for s in stems], desc="CUDA C++", unit=" files", leave=False):
        results += audited_cuda(stem, arch)
    files = [path for family in families for path in family.triton]
    return Sweep(results, unreached(plan, list(runs), [*files, *shared], whole), compiled)


def audited(plan: Plan, processes: int | None = None) -> tuple[list[Result], int]:
    """(the result of each binary of a plan, how many were compiled for it)."""
    reports, compiled = _compile.reports([job.launch for job in plan.jobs.values()], processes)
    return [_result(job, reports[key]) for key, job in plan.jobs.items()], compiled


def _result(job: Job, report: Report | str) -> Result:
    launch = job.launch
    result = Result(title(launch), _config(launch), " ".join(launch.dtypes), launch.arch, call=str(job.call))
    if isinstance(report, str):
        result.faults.append(report)
    else:
        result.figures = _figures(report)
        result.faults += judge(launch, report, job.aligned)
    return result


def _figures(report: Report) -> dict[str, Any]:
    return {name: getattr(report, name) for name in SHOWN}


def _config(launch: Planned) -> str:
    """What distinguishes a kernel's binaries: constants, what 16 divides, warps and stages."""
    constants = " ".join(f"{k}={v}" for k, v in launch.constants.items())
    odd = f" odd={','.join(sorted(launch.odd))}" if launch.odd else ""
    wide = [name for name, kind in launch.signature.items() if kind == "i64"]
    wide_text = f" wide={','.join(wide)}" if wide else ""
    return f"{constants}{odd}{wide_text} warps={launch.warps} stages={launch.stages}"


def audited_cuda(stem: str, arch: int, only: str = "") -> list[Result]:
    """The kernels of one CUDA C++ file (or of a part of it, as launches name it). Their packs are aligned; budgets stand
    in the launchers' module."""
    from gpulayers.testing.nvrtc import audit_cuda

    budgets = getattr(importlib.import_module(f"gpulayers.kernels.cuda.{stem}"), "BUDGETS", {})
    results = []
    for name, report in audit_cuda(stem, arch, only=only).items():
        budget = cuda_budget(name, budgets)
        report = report.launched(budget.threads, budget.shared)
        kernel, dtypes, rest = _cuda_name(name)
        config = f"{rest} threads={budget.threads}".strip()
        result = Result(f"cuda/{stem}.{kernel}", config, dtypes, arch, _figures(report), call=f"{stem}.cu")
        result.faults += report.faults(name.endswith("packs"), budget, budget.rightly_narrow({}))
        results.append(result)
    return results


def _cuda_name(name: str) -> tuple[str, str, str]:
    """(kernel, its arrays' dtypes, the rest) of ``layer_norm_forward_bfloat16_float32_packs``."""
    parts = re.fullmatch(r"(.+?)(?:((?:_b?float(?:16|32))+)(?:_(.+))?)?", name)
    assert parts is not None
    return parts[1], (parts[2] or "").replace("_", " ").strip(), parts[3] or ""


def cuda_budget(kernel: str, budgets: dict[str, Budget]) -> Budget:
    """The budget of the first pattern that fits a kernel of CUDA C++; without limits if none does."""
    return next((b for pattern, b in budgets.items() if fnmatch.fnmatchcase(kernel, pattern)), Budget())
