"""Commands that measure kernels, tune them, and read their machine code."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import Any

from gpulayers import _console, dispatch
from gpulayers.cli import _words
from gpulayers.ops._op import Op


def add(commands: Any) -> None:
    p = commands.add_parser("bench", help="measure: kernels on a GPU against others, or what a CPU can measure")
    p.add_argument("family", nargs="*", help="only these families of ops; fused, what gl.fuse writes; or FILE.py:op")
    p.add_argument("--input-shape", default=(), nargs="+", help="of an op of your own, one for each input: 4096,4096")
    p.add_argument(
        "--cpu", action="store_true", help="the NumPy side against torch, the cost of dispatch and of imports"
    )
    p.add_argument(
        "--models", nargs="*", help="train and run whole models, these or all: plain, patched, compiled, both"
    )
    p.add_argument("--tiny", action="store_true", help="with --models: in small (on a CPU always)")
    p.add_argument("--host", action="store_true", help="what launching costs, without a GPU, beside torch's own layers")
    p.add_argument(
        "--gpu", dest="device", action="store_const", const="cuda", help="the kernels against others on the GPU"
    )
    p.add_argument(
        "--device", choices=["cuda", "cpu"], help="the same on this device: a CPU runs NumPy in place of kernels"
    )
    p.add_argument(
        "--minutes", type=_console.positive, default=float("inf"), help="time limit; the most valuable cases come first"
    )
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("bench-results"), help="folder to write to")
    p.add_argument("--resume", action="store_true", help="go on with the results that are in --out")
    p.add_argument(
        "--providers",
        nargs="+",
        default=(),
        help="only these: triton, cuda, torch, torch.compile, …; plain, patched, …",
    )
    p.add_argument("--dtypes", nargs="+", default=(), help="in this order (default: bfloat16 float32)")
    p.add_argument("--seconds", type=_console.positive, default=1.0, help="for each case and provider, with --cpu")
    p.add_argument("--no-plots", action="store_true", help="bench/report.py --add draws them, too")
    p.set_defaults(run=_bench)

    p = commands.add_parser("tune", help="search the kernels' configurations on this GPU; writes the tables of them")
    p.add_argument("family", nargs="*", help="only what these families' shapes ask for; or FILE.py:Class, to be fused")
    p.add_argument(
        "--input-shape", default=(), nargs="+", help="of a class, one for each input, batch first: 4096,1024"
    )
    p.add_argument("--args", default="", help="a class's arguments, as Python: '64, bias=False'")
    p.add_argument("--dtype", default="bfloat16", help="of a class's inputs")
    p.add_argument(
        "--minutes", type=_console.positive, default=float("inf"), help="time limit; the same command goes on"
    )
    p.add_argument("--out", type=pathlib.Path, help="folder to write to, in place of the project's own table")
    p.add_argument("--arch", help="sm_80, …: say which table is in use there (default: this GPU's, which is tuned)")
    p.set_defaults(run=_tune)

    p = commands.add_parser("audit", help="compile all kernels for GPUs that need not be there, and read their code")
    p.add_argument("family", nargs="*", help="families of ops, as in gpulayers.ops (default: all)")
    p.add_argument("--arch", default="", help="default: sm_80,sm_86,sm_89,sm_90,sm_100,sm_120")
    p.add_argument("--dtype", default="", help="default: bfloat16,float32, and float16 for one architecture")
    p.add_argument("--all", action="store_true", help="a line for each configuration, not for the worst of a kernel's")
    p.add_argument("--diff", metavar="REV", help="compare with another commit of this checkout")
    p.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write all figures to a file")
    p.set_defaults(run=_audit)


def _audit(options: Any) -> int:
    """Every kernel's machine code in figures, for GPUs that need not be there."""
    if not dispatch.installed("triton"):
        raise RuntimeError('audit: Triton and torch compile, and are not installed (pip install "gpulayers[torch]")')
    _words.require_families("audit", options.family)
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"audit: --json: the rule is a file in a folder that is there; got {str(options.json)!r}")
    from gpulayers.sweep import audit

    return audit(options)


def _bench(options: Any) -> int:
    """Measure; without --cpu, --gpu or --device what there is: the GPU, else the CPU."""
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError('bench: it compares with torch, which is not installed (pip install "gpulayers[torch]")')
    if any(":" in name for name in options.family):
        return _bench_own(options)
    _words.require_families("bench", options.family, "fused")
    from gpulayers.bench import run

    return run.bench(options)


def _bench_own(options: Any) -> int:
    from gpulayers.bench.own import bench_op

    shapes, on = [_words.shape(text) for text in options.input_shape], "cpu" if options.cpu else options.device or ""
    for name in options.family:
        op = _words.op(name)
        if not op.required <= len(shapes) <= len(op.inputs):
            rule = f"--input-shape with a shape for each of {', '.join(op.inputs)}"
            raise ValueError(f"{op.name}: the rule is {rule}; got {len(shapes)}")
        rows = bench_op(op, *shapes, dtypes=options.dtypes or ["bfloat16", "float32"], on=on)
        if any(row["status"] != "ok" for row in rows):
            return 1
    return 0


def _tune(options: Any) -> int:
    """Search configurations on this GPU; without one, say which table is in use."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            'tune: it times Triton kernels, and Triton is not installed (pip install "gpulayers[torch]")'
        )
    if any(":" in name for name in options.family):
        return _tune_own(options)
    _words.require_families("tune", options.family)
    from gpulayers.bench.tuning import tune

    return tune.command(options.family, options.minutes, options.out, options.arch)


def _tune_own(options: Any) -> int:
    from gpulayers.authoring import subject
    from gpulayers.bench.tuning import fused

    (target, *more), shapes = options.family, [_words.shape(text) for text in options.input_shape]
    found = subject.found(target)
    if more or isinstance(found, Op) or not shapes:
        raise ValueError("tune: the rule is one FILE.py:Class, a layer, with --input-shape, batch first")
    layer, _ = subject.made(found, *_words.arguments(options.args, "--args"))
    return fused.command(layer, shapes, options.dtype)
