"""Measure: ``python bench/run.py --cpu`` here, ``python bench/run.py --gpu-suite --out DIR`` on a machine with a GPU.

Results are JSON with the machine, the versions and the commit; tables are printed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a file, from a bare checkout
    sys.path[:] = [str(ROOT), *(p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT / "bench")]

from gpulayers.bench import _cpu, _gpu, _host  # noqa: E402

import gpulayers  # noqa: E402
from gpulayers._table import table  # noqa: E402

SUITE_MINUTES = 9.0
_A_CASE_SECONDS = 20
_PROCESSES = 12
"""That run the tests: most of their time goes into compiling kernels, on the CPU."""


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


def write(path: pathlib.Path, results: dict[str, Any], quiet: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **results}, indent=1))
    if not quiet:
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
        results["host"] = _host.host_cost()
        print(
            table(
                ["drop-in", "forward µs", "with grad µs", "torch.nn's µs", "backward µs", "torch.nn's µs", "ratio"],
                [[f"{v:.1f}" if isinstance(v, float) else v for v in r.values()] for r in results["host"]],
            )
        )
        print(f"import: numpy {cost['numpy']:.3f} s, gpulayers {cost['gpulayers']:.3f} s, above {cost['above']:.3f} s")
    write(options.out / "cpu.json", results)


def gpu(options: argparse.Namespace, until: float) -> None:
    """Every case on the GPU; each row is on disk as soon as it exists.

    After an error that the process does not survive, another one goes on behind the case that raised it.
    """
    from gpulayers.arrays import bfloat16, float32

    path = options.out / "gpu.json"
    before = json.loads(path.read_text()) if options.resume else {}
    limit = before.get("limits") or _gpu.limits()
    rows: list[dict[str, Any]] = before.get("rows", [])
    seen = {(r["family"], r["op"], r["case"], r["dtype"]) for r in rows}
    todo = [(f, c, d) for d in (bfloat16, float32) for f, c in _cpu.cases(options.family)]
    for family, case, dtype in todo:
        if (about := (family, case.op.name, case.name, str(dtype))) in seen:
            continue
        if time.monotonic() > until - _A_CASE_SECONDS:
            print("out of time: the remaining cases were not measured")
            break
        try:
            rows += [{"family": family, **r} for r in _gpu.measure(case, dtype, limit)]
        except Exception as error:  # one broken kernel must not cost the others their measurement
            rows.append(dict(zip(("family", "op", "case", "dtype"), about)) | {"wrong": repr(error)[:500]})
        write(path, {"limits": limit, "rows": rows}, quiet=True)
        if not _gpu.alive():
            left = f"--minutes={max(0.0, (until - time.monotonic()) / 60)}"
            again = [str(ROOT / "bench" / "run.py"), *options.family, "--gpu", "--resume", left, f"--out={options.out}"]
            subprocess.run([sys.executable, *again])
            return
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
        if "us" in r and not r.get("wrong")
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
    spread = ["-n", str(_PROCESSES), "--dist=worksteal"] if importlib.util.find_spec("xdist") else []
    # Machine code is audited without a GPU, by the compiler that the project pins.
    chosen = ["-k", "not machine_code", "--maxfail=40", "--tb=short", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=--import-mode=importlib", *spread, *chosen]
    tests = [
        str(p)
        for p in sorted((ROOT / "tests").glob("test_*.py"))
        if p.stem not in ("test_house", "test_audit", "test_sweep")
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        run = subprocess.Popen(
            [*command, *tests], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            run.wait(60 * options.minutes * 0.6)
        except subprocess.TimeoutExpired:
            print("the tests ran out of time")
        for last in (signal.SIGINT, signal.SIGKILL):  # asked to stop, it still prints what failed
            if run.poll() is None:
                os.killpg(run.pid, last)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(15)
    print("\n".join(log.read_text().splitlines()[-40:]))
    gpu(options, until)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="*", help="only these families")
    parser.add_argument("--cpu", action="store_true", help="the NumPy side against torch on this CPU")
    parser.add_argument("--gpu", action="store_true", help="the kernels on this GPU")
    parser.add_argument("--gpu-suite", action="store_true", help="the tests on this GPU, then the benchmarks")
    parser.add_argument("--resume", action="store_true", help="go on with the --gpu results that are in --out")
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
