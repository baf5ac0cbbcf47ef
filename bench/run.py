"""Measure from a bare checkout: ``python bench/run.py …`` is ``gpulayers bench …``.

``python bench/run.py --gpu-suite --minutes N --out DIR`` is ``suite/``: all that a GPU hour can show.
"""

from __future__ import annotations

import functools
import pathlib
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __package__ in (None, ""):  # run as a file
    sys.path[:] = [str(ROOT), *(p for p in sys.path if pathlib.Path(p or ".").resolve() != ROOT / "bench")]

from gpulayers.bench.cases.case import BESIDE, every_case  # noqa: E402
from gpulayers.bench.measuring import cpu, host, lab, warm  # noqa: E402
from gpulayers.bench.measuring.device import Device, device  # noqa: E402
from gpulayers.bench.measuring.records import Store, failed, machine, write_json, write_text  # noqa: E402
from gpulayers.bench.measuring.timing import geometric_mean  # noqa: E402
from gpulayers.bench.reporting import against, plots, tables  # noqa: E402
from gpulayers.bench.suite import suite  # noqa: E402

from gpulayers import _console, arrays, inventory  # noqa: E402
from gpulayers.testing.arena import has_gpu  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32")
"""Those that limits are measured in."""


def bench(options: Any) -> int:
    """``gpulayers bench`` with its parsed options; the exit status."""
    if options.models is not None:
        return _with_models(options)
    if options.host:
        return _with_null_driver(options)
    if options.cpu or not (options.device or has_gpu()):
        return _with_cpu(options)
    return _with_device(options)


def _ahead(on: Device, only: Sequence[str], until: float) -> dict[str, Any]:
    """How the lab has Triton's kernels compiled before they are measured; nothing where none will be."""
    how = _compiling(on, warm.warm) if not only or "triton" in only else None
    return {} if how is None else {"prepare": functools.partial(how, until=until)}


def _compiling(on: Device, how: Callable[..., None]) -> Callable[..., None] | None:
    """``how``, told the GPU's architecture; None without one."""
    if on.name != "cuda":
        return None
    import torch
    from gpulayers.kernels.triton import _tile

    return functools.partial(how, arch=_tile.real_device(torch.cuda.current_device()).arch)


def _with_device(options: Any) -> int:
    """Every case on a device; each row is on disk, in ``--out``/bench.json, as soon as it exists."""
    until = time.monotonic() + 60 * options.minutes
    on = device(options.device or "cuda")
    families = options.family or ([*inventory.families(), *BESIDE] if on.name == "cuda" else ())
    cases = [(f, c) for f, c in every_case(families) if c.cpu or on.name == "cuda"]
    dtypes = [*map(arrays.dtype, options.dtypes or ("bfloat16", "float32"))]
    if unknown := [str(d) for d in dtypes if str(d) not in DTYPES]:
        raise ValueError(f"--dtypes: the rule is some of {', '.join(DTYPES)}; got {', '.join(unknown)}")
    tasks = lab.ordered(cases, dtypes)
    store = Store(options.out, options.resume)
    status = lab.run(on, store, tasks, until=until, only=options.providers, **_ahead(on, options.providers, until))
    tables.show_results(store.results)
    if beside := against.lines(store.results["rows"]):
        tables.show(against.HEAD, beside, "kernels that gl.fuse wrote")
    bad = sum(map(failed, store.results["rows"]))
    if not options.no_plots:
        try:
            print(f"drawn: {', '.join(map(str, plots.write(store.results, options.out))) or 'nothing'}")
        except RuntimeError as error:  # no matplotlib
            print(f"not drawn: {error}")
    print(f"{len(store.results['rows'])} rows in {store.path}" + (f"; {bad} FAILED" if bad else ""))
    if status == lab.DIED:
        print("the device does not answer this process any more: run again with --resume")
    return status


def _with_models(options: Any) -> int:
    """Whole models; each row is on disk, in ``--out``/models.json, as soon as it exists."""
    from gpulayers.bench.measuring import whole, zoo
    from gpulayers.bench.models.zoo import kinds
    from gpulayers.bench.reporting import models

    on = device(options.device or ("cuda" if has_gpu() and not options.cpu else "cpu"))
    size = "tiny" if options.tiny or on.name == "cpu" else "full"
    precisions = options.dtypes or ["float32" if on.name == "cpu" else "bfloat16"]
    for name, asked, known in (("dtypes", precisions, whole.WIDER), ("providers", options.providers, whole.WAYS)):
        if unknown := [word for word in asked if word not in known]:
            raise ValueError(f"--{name}: the rule is some of {', '.join(known)}; got {', '.join(unknown)}")
    chosen = kinds(size, options.models)
    store = zoo.Store(options.out, on.about(), size, options.resume)
    jobs = zoo.ordered(list(chosen), options.providers or whole.WAYS, precisions)
    until = time.monotonic() + 60 * options.minutes
    status = zoo.run(on, store, chosen, jobs, until, prepare=_compiling(on, warm.warm_model))
    models.show(store.whole)
    if not options.no_plots:
        write_text(options.out / "models.md", models.markdown(store.whole) + "\n")
        try:
            print(f"drawn: {models.draw(store.whole, options.out / 'models.png') or 'nothing'}")
        except RuntimeError as error:  # no matplotlib
            print(f"not drawn: {error}")
    bad = sum(map(zoo.failed, store.rows))
    print(f"{len(store.rows)} rows in {store.path}" + (f"; {bad} FAILED" if bad else ""))
    return status


def _with_cpu(options: Any) -> int:
    """The NumPy side against torch on the CPU, dispatch and import cost, whole steps of training."""
    if options.family and not set(options.family) - set(BESIDE):
        can = "python tests/check_fuse.py --audit shows their machine code beside that of the kernels by hand"
        raise RuntimeError(f"bench {' '.join(options.family)}: it times kernels on a GPU; without one, {can}")
    rows = cpu.against_torch(options.family, options.seconds)
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
    tables.show(["op", "case", "ms", "p20–p80", "torch ms", "ratio", "at most"], cells)
    results: dict[str, Any] = {"against_torch": rows}
    if rows:
        mean = geometric_mean(r["ratio"] for r in rows)
        over = [f"{r['op']} ({r['case']})" for r in rows if r["ratio"] > r["most"]]
        print(f"geometric mean {mean:.2f} over {len(rows)} cases; over their limit: {', '.join(over) or 'none'}")
        results["geometric_mean"] = mean
    if not options.family:
        from gpulayers.bench.measuring import steps

        results |= {"python": host.yardstick(), "dispatch": cpu.dispatch_cost(), "import": cpu.import_cost()}
        results["host"] = host.host_cost()
        results["steps"] = steps.against_torch(options.seconds)
        _show_costs(results)
        slow = [f"{r['model']} ({r['mode']})" for r in results["steps"] if r["ratio"] > r["most"]]
        print(f"training steps over their limit: {'; '.join(slow) or 'none'}")
    write_json(options.out / "cpu.json", {"machine": machine(), **results})
    print(f"written: {options.out / 'cpu.json'}")
    return 0


def _with_null_driver(options: Any) -> int:
    """What launching costs on the host, over a driver that does nothing; 1 where a limit is missed."""
    from gpulayers.bench.measuring import launching

    found = launching.measured()
    numbers = ("call", "torch_call", "step", "torch_step")
    head = [
        "op",
        "launches",
        "allocations",
        "calls (Python, C)",
        "torch's",
        "µs",
        "torch's µs",
        "both µs",
        "torch's both",
    ]
    rows = [
        [
            *(r["op"], r["launches"], r["allocations"], f"{r['python_calls']}, {r['c_calls']}"),
            *(f"{r['torch_python_calls']}, {r['torch_c_calls']}", *(f"{r[f'{n}_us']:.1f}" for n in numbers)),
        ]
        for r in found["ops"]
    ]
    tables.show(head, rows, "a repeat, without gradients and both ways, over a driver that does nothing")
    limits = [[r["what"], f"{r['ratio']:.2f}", f"{r['most']:.1f}"] for r in found["limits"]]
    tables.show(["what", "× torch", "at most"], limits)
    y = found["yardsticks"]
    print(
        f"torch's relu of 64 numbers {y['relu_us']:.2f} µs, a tape of one launch {y['tape_us']:.2f} µs; AdamW "
        f"{y['adamw_us']:.0f} µs, torch's {y['torch_adamw_us']:.0f} µs"
    )
    write_json(options.out / "host.json", {"machine": machine(), **found})
    print(f"written: {options.out / 'host.json'}")
    missed = [r["what"] for r in found["limits"] if r["ratio"] > r["most"]]
    print(f"over their limit: {'; '.join(missed)}" if missed else f"all {len(found['limits'])} limits are kept")
    return int(bool(missed))


def _show_costs(results: dict[str, Any]) -> None:
    for name, head in (
        ("dispatch", ["op", "function µs", "dispatched µs", "above µs"]),
        ("steps", ["model", "mode", "patched ms", "torch.nn's ms", "ratio", "at most"]),
        ("host", ["drop-in", "forward µs", "with grad µs", "torch.nn's µs", "backward µs", "torch.nn's µs", "ratio"]),
    ):
        tables.show(head, [[f"{v:.2f}" if isinstance(v, float) else v for v in r.values()] for r in results[name]])
    python, cost = results["python"], results["import"]
    print(
        f"this Python: {python['call_us']:.3f} µs an empty call, {python['relu_us']:.2f} µs torch's relu of 64 numbers"
    )
    print(f"import: numpy {cost['numpy']:.3f} s, gpulayers {cost['gpulayers']:.3f} s, above {cost['above']:.3f} s")


def main() -> None:
    """The command line's ``bench``, or the suite."""
    _console.any_encoding()
    if "--gpu-suite" in sys.argv:
        raise SystemExit(suite.main([word for word in sys.argv[1:] if word != "--gpu-suite"]))
    sys.argv[1:1] = ["bench"]
    runpy.run_module("gpulayers", run_name="__main__")


if __name__ == "__main__":
    main()
