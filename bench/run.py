"""Measure: ``python bench/run.py --cpu`` here, ``python bench/run.py --gpu-suite --out DIR`` on a machine with a GPU.

Results are JSON with the machine, the versions and the commit; tables are printed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import platform
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a file, from a bare checkout
    sys.path[:] = [str(ROOT), *(p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT / "bench")]

from gpulayers.bench import _cpu, _gpu  # noqa: E402

import gpulayers  # noqa: E402
from gpulayers._table import table  # noqa: E402

SUITE_MINUTES = 9.0


def machine() -> dict[str, Any]:
    """What a result is worth nothing without."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "processor": _processor(),
        "gpulayers": gpulayers.__version__,
        "commit": _commit(),
    }
    for package in ("numpy", "torch", "triton", "cupy"):
        module = sys.modules.get(package)
        found[package] = getattr(module, "__version__", None)
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
            found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    cpu = pathlib.Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def write(path: pathlib.Path, results: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1))
    print(f"written: {path}")


def cpu(options: argparse.Namespace) -> None:
    """The NumPy side against torch on the CPU, dispatch and import cost."""
    rows = _cpu.against_torch(options.family, options.seconds)
    cells = [
        [
            r["op"],
            r["case"],
            f"{r['ms']:.3f}",
            f"{r['p20']:.3f}–{r['p80']:.3f}",
            f"{r['torch_ms']:.3f}",
            f"{r['ratio']:.2f}",
            f"{r['most']:.1f}",
        ]
        for r in rows
    ]
    print(table(["op", "case", "ms", "p20–p80", "torch ms", "ratio", "at most"], cells))
    results: dict[str, Any] = {"against_torch": rows}
    if rows:
        mean = _cpu.geometric_mean([r["ratio"] for r in rows])
        over = [f"{r['op']} ({r['case']})" for r in rows if r["ratio"] > r["most"]]
        print(f"geometric mean {mean:.2f} over {len(rows)} cases; over their limit: {', '.join(over) or 'none'}")
        results["geometric_mean"] = mean
    if not options.family:
        results["dispatch"], results["import"] = _cpu.dispatch_cost(), _cpu.import_cost()
        print(
            table(
                ["op", "function µs", "dispatched µs", "above µs"],
                [[f"{v:.2f}" if isinstance(v, float) else v for v in r.values()] for r in results["dispatch"]],
            )
        )
        cost = results["import"]
        print(f"import: numpy {cost['numpy']:.3f} s, gpulayers {cost['gpulayers']:.3f} s, above {cost['above']:.3f} s")
    write(options.out / "cpu.json", results)


def gpu(options: argparse.Namespace, until: float) -> None:
    """Every case on the GPU; each row is on disk as soon as it exists."""
    from gpulayers.arrays import bfloat16, float32

    limit = _gpu.limits()
    rows: list[dict[str, Any]] = []
    for family, case in _cpu.cases(options.family):
        for dtype in (bfloat16, float32):
            if time.monotonic() > until:
                print("out of time: the remaining cases were not measured")
                break
            try:
                rows += [{"family": family, **r} for r in _gpu.measure(case, dtype, limit)]
            except Exception as error:  # one broken kernel must not cost the others their measurement
                rows.append(
                    {"family": family, "op": case.op.name, "case": case.name, "dtype": str(dtype), "wrong": repr(error)}
                )
            write(options.out / "gpu.json", {"limits": limit, "rows": rows})
    shown = [
        [
            r["op"],
            r["case"],
            r["dtype"],
            r.get("direction", ""),
            r.get("provider", ""),
            f"{r['us']:.1f}",
            f"{r['share_of_limit']:.0%}",
        ]
        for r in rows
        if not r.get("wrong")
    ]
    print(table(["op", "case", "dtype", "direction", "provider", "µs", "of limit"], shown))
    for r in rows:
        if r.get("wrong"):
            print(f"WRONG {r['op']} {r['case']} {r['dtype']} {r.get('provider', '')}: {r['wrong']}")


def gpu_suite(options: argparse.Namespace) -> None:
    """The tests on the device, then the benchmarks, within the time limit."""
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    log = options.out / "tests.log"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "--maxfail=40",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
    ]
    families = [
        str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if p.stem not in ("test_house", "test_audit")
    ]
    with open(log, "w") as file:
        try:
            limit = 60 * options.minutes * 0.6
            subprocess.run([*command, *families], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=limit)
        except subprocess.TimeoutExpired:
            print("the tests ran out of time")
    print("\n".join(log.read_text().splitlines()[-40:]))
    gpu(options, until)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help="only these families")
    parser.add_argument("--cpu", action="store_true", help="the NumPy side against torch on this CPU")
    parser.add_argument("--gpu", action="store_true", help="the kernels on this GPU")
    parser.add_argument("--gpu-suite", action="store_true", help="the tests on this GPU, then the benchmarks")
    parser.add_argument("--minutes", type=float, default=SUITE_MINUTES, help="time limit of --gpu and --gpu-suite")
    parser.add_argument("--seconds", type=float, default=1.0, help="a case, on the CPU")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-results"))
    options = parser.parse_args()
    if options.gpu_suite:
        gpu_suite(options)
    elif options.gpu:
        gpu(options, time.monotonic() + 60 * options.minutes)
    else:
        cpu(options)


if __name__ == "__main__":
    main()
