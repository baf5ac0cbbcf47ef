"""The command line: gpulayers info | explain | new | check | fuse | train | export | bench | tune | audit."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

import gpulayers as gl
from gpulayers import _console, arrays, dispatch
from gpulayers._table import table
from gpulayers.arrays import Spec
from gpulayers.export import FORMATS, NEXT_STEPS
from gpulayers.inventory import PACKAGES, backends_of, families, ops, version
from gpulayers.ops._op import Op

WRONG_INPUT = (RuntimeError, ValueError, TypeError, LookupError, OSError, ImportError, ArithmeticError, MemoryError)
"""What a command raises where it cannot do what was asked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0; 1 where it found something wrong; 2 where it could not run.

    The reason is one line on stderr.
    """
    _console.any_encoding()
    options = _parser().parse_args(argv)
    try:
        dispatch.permitted()
        return options.run(options)
    except BrokenPipeError:
        _console.closed_pipe()
        return 1
    except KeyboardInterrupt:
        print("gpulayers: interrupted", file=sys.stderr)
        return 130
    except AssertionError as error:  # a layer that is wrong
        print(f"gpulayers: {error}", file=sys.stderr)
        return 1
    except WRONG_INPUT as error:
        print(f"gpulayers: {_console.one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _console.Parser(prog="gpulayers", description=gl.__doc__)
    parser.add_argument("--version", action="version", version=gl.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="devices, packages, and which backend has each op").set_defaults(run=info)

    p = commands.add_parser("explain", help="who would compute an op here, and why")
    p.add_argument("op", help="the op's name, as in gpulayers.ops: softmax, conv, …; or FILE.py:op, one of your own")
    shapes = "shapes of its inputs: 8,3,32,32 16,3,3,3; - for None, 8:int64 for another dtype, [8 3,4] for a list"
    p.add_argument("--shapes", default="", help=shapes, nargs="*")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--options", default="", help='as in "kernel_size=2, stride=(1, 2)"')
    p.set_defaults(run=explain)

    p = commands.add_parser("new", help="write a layer of your own, and its test, to start from")
    p.add_argument("name", help="of its class, as MyLayer; the files are my_layer.py and test_my_layer.py")
    neurons = (
        'neuron type: "fully connected", convolutional, pooling or elementwise (default); fc, conv and pool do, too'
    )
    p.add_argument("--neuron", default="elementwise", help=neurons)
    p.add_argument("--kernel", choices=["triton", "cuda"], help="with a kernel of its own (elementwise)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."), help="folder to write to (default: this one)")
    p.set_defaults(run=new)

    p = commands.add_parser("check", help="check a layer, or an op with its kernels, of your own")
    p.add_argument("target", help="FILE.py:Class, or FILE.py:op, which needs --input-shape")
    p.add_argument(
        "--args", default="", help='arguments of the class: "16, bias=False" (default: small sizes, by name)'
    )
    shape = "batch first, as in 4,8, one for each input (default: what the layer takes, by its neuron type)"
    p.add_argument("--input-shape", default=(), nargs="+", help=shape)
    p.add_argument(
        "--dtypes", default=("float32", "float16", "bfloat16"), nargs="*", help="it must serve beside float64"
    )
    p.add_argument(
        "--seed", type=_console.at_least(0), default=0, help="of the inputs, and of the weights that are tried"
    )
    p.set_defaults(run=check)

    p = commands.add_parser("fuse", help="write a layer's array code as Triton kernels, to read or to go on by hand")
    p.add_argument("target", help="FILE.py:Class")
    p.add_argument("--args", default="", help="arguments of the class, as for check")
    p.add_argument("--input-shape", default=(), nargs="+", help=shape)
    p.add_argument("--out", type=pathlib.Path, help="the file to write (default: it is printed)")
    p.set_defaults(run=fuse)

    p = commands.add_parser("train", help="train the demonstration network on handwritten digits")
    p.add_argument("data", choices=["digits", "mnist"])
    p.add_argument("--data", dest="folder", default="mnist-data", help="folder with MNIST's four IDX files")
    p.add_argument("--out", default=None, help="folder to write to (default: the name of the data)")
    p.add_argument("--epochs", type=_console.at_least(1), default=15)
    p.add_argument("--batch-size", type=_console.at_least(1), default=64)
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    p.add_argument("--precision", choices=["bfloat16", "float16"], default=None)
    p.add_argument("--seed", type=_console.at_least(0), default=0)
    p.set_defaults(run=train)

    p = commands.add_parser("export", help="write a saved model for elsewhere: Node.js, browsers, onnxruntime")
    p.add_argument("model", help="the folder that gl.save wrote")
    p.add_argument("--format", choices=sorted(FORMATS), default="tfjs")
    p.add_argument("--out", required=True, help="where to write it to")
    p.add_argument("--layers", action="append", default=[], type=pathlib.Path, help="FILE.py with layers of your own")
    p.add_argument("--input-shape", nargs="+", default=(), help="batch first, if the model was never called")
    p.set_defaults(run=export)

    _lab(commands)
    return parser


def _lab(commands: Any) -> None:
    """The commands that measure kernels and read their machine code."""
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
    p.set_defaults(run=bench)

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
    p.set_defaults(run=tune)

    p = commands.add_parser("audit", help="compile all kernels for GPUs that need not be there, and read their code")
    p.add_argument("family", nargs="*", help="families of ops, as in gpulayers.ops (default: all)")
    p.add_argument("--arch", default="", help="default: sm_80,sm_86,sm_89,sm_90,sm_100,sm_120")
    p.add_argument("--dtype", default="", help="default: bfloat16,float32, and float16 for one architecture")
    p.add_argument("--all", action="store_true", help="a line for each configuration, not for the worst of a kernel's")
    p.add_argument("--diff", metavar="REV", help="compare with another commit of this checkout")
    p.add_argument("--json", metavar="FILE", type=pathlib.Path, help="write all figures to a file")
    p.set_defaults(run=audit)


def info(options: Any) -> int:
    """Devices, versions, and a table op × backend."""
    versions = [[p, version(p)] for p in PACKAGES]
    print(table(["package", "version"], [["gpulayers", gl.__version__], *versions]))
    print("\n" + table(["device", "what"], _devices()) + "\n")
    rows = []
    for op in ops():
        has = backends_of(op)
        rows.append(
            [
                op.family,
                op.name,
                *("yes" if b in has else "" for b in dispatch.KERNELS),
                "yes",
                _here(has),
            ]
        )
    print(
        table(
            ["family", "op", "Triton", "CUDA", "ATen", "NumPy kernel", "definition", "a CPU array here runs on"], rows
        )
    )
    return 0


def ops_markdown() -> str:
    """The README's table: each family's ops, by the kernels they have."""
    lines = ["| family | ops | Triton | CUDA | ATen | NumPy kernel |", "|---|---|---|---|---|---|"]
    grouped: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for op in ops():
        grouped.setdefault((op.family, tuple(backends_of(op))), []).append(op.name)
    for (family, has), names in grouped.items():
        marks = " | ".join("yes" if b in has else "" for b in dispatch.KERNELS)
        lines.append(f"| {family} | {', '.join(names)} | {marks} |")
    return "\n".join(lines)


def _here(has: list[str]) -> str:
    return "numpy" if "numpy" in has else "definition"


def _devices() -> list[list[str]]:
    extensions = np.show_config(mode="dicts").get("SIMD Extensions", {}).get("found", [])
    rows = [["cpu", extensions[-1] if extensions else "NumPy"]]
    if importlib.util.find_spec("torch"):
        import torch

        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            rows.append([f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"])
    if len(rows) == 1:
        rows.append(["cuda", "none: CPU arrays run on NumPy; GPU kernels can be interpreted (gpulayers.testing)"])
    return rows


def explain(options: Any) -> int:
    """Who would compute the op, for CPU arrays and for CUDA arrays."""
    op = _op(options.op)
    defaults = [n if n in op.needed else f"{n}={v!r}" for n, v in op.options.items()]
    about = f"{op.family}.{op.name}({', '.join(op.inputs)}{'; ' if defaults else ''}{', '.join(defaults)})"
    text = "\n".join([about, *(line.strip() for line in (op.__doc__ or "").strip().splitlines())])
    if not options.shapes:
        print(
            f"{text}\n\nkernels: {', '.join(backends_of(op)) or 'none'}, and the definition; give --shapes for the choice"
        )
        return 0
    positional, given = _arguments(options.options, "--options")
    if positional:
        raise ValueError(f"--options: the rule is name=value, …; got {options.options!r}")
    specs = _specs(options.shapes, options.dtype)
    try:
        backend, reasons = dispatch.explain(op, *specs, **given)
    except AttributeError as error:  # a list where an array must be
        came = " ".join(options.shapes)
        raise TypeError(f"{op.name}: --shapes: the rule is a list only for an input that is one; got {came}") from error
    chosen = table(["backend", "for these arrays on the CPU"], [*reasons.items(), [backend, "computes it"]])
    print(f"{text}\n\n{chosen}")
    return 0


def _op(name: str) -> Op:
    """One of the library's, or of one's own in FILE.py:name."""
    if ":" in name:
        from gpulayers.authoring import subject

        own = subject.found(name)
        if not isinstance(own, Op):
            raise ValueError(f"the rule is FILE.py:op, made by gl.op; got {name!r}")
        return own
    found = {op.name: op for op in ops()}
    if name not in found:
        raise ValueError(f"no op {name!r}; there are {', '.join(found)}")
    return found[name]


def _specs(words: Sequence[str], dtype: str) -> list[Any]:
    """Specs of an op's inputs, None for "-", a list of them for what stands in brackets."""
    found: list[Any] = []
    into = found
    for word in words:
        opens, closes = word.startswith("["), word.endswith("]")
        if opens == (into is not found) and (opens or closes):
            raise ValueError(f"--shapes: the rule is a list as [8 3,4]; got {' '.join(words)}")
        if opens:
            into = []
            found.append(into)
        inner = word.removeprefix("[").removesuffix("]")
        shape, _, own = inner.partition(":")
        if shape or inner == word:
            into.append(None if shape == "-" else Spec(_shape(shape), arrays.dtype(own or dtype)))
        if closes:
            into = found
    if into is not found:
        raise ValueError(f"--shapes: the rule is a list as [8 3,4]; got {' '.join(words)}")
    return found


def _arguments(text: str, option: str) -> tuple[tuple, dict[str, Any]]:
    """What stands between the brackets of a call."""
    try:
        return eval(f"(lambda *a, **k: (a, k))({text})", {})
    except Exception as error:
        raise ValueError(f"{option}: the rule is arguments as in 16, bias=False; got {text!r} ({error})") from None


def _shape(text: str) -> tuple[int, ...]:
    """8,3,32 or 8x3x32, in parentheses or not; "" and () are the shape of a number."""
    inner = text.strip().removeprefix("(").removesuffix(")")
    words = inner.replace("x", ",").removesuffix(",").split(",") if inner.strip() else []
    if not all(n.strip().isdecimal() for n in words):
        raise ValueError(f"the rule is a shape of integers ≥ 0, as in 8,3,32,32; got {text!r}")
    return tuple(map(int, words))


def new(options: Any) -> int:
    """A layer and its test, to start from."""
    from gpulayers.authoring import new

    layer, test = new(options.name, options.neuron, options.out, options.kernel)
    print(f"{layer}\n{test}\n\nedit it, then: gpulayers check {shlex.quote(f'{layer}:{options.name}')}")
    return 0


def check(options: Any) -> int:
    """check_layer on a class in a file; the kernels of an op in it against its definition."""
    from gpulayers.authoring import fused, subject
    from gpulayers.testing import check_layer

    args, kwargs = _arguments(options.args, "--args")
    dtypes = list(map(arrays.dtype, options.dtypes))
    shapes = [_shape(text) for text in options.input_shape]
    found = subject.found(options.target)
    if isinstance(found, Op):
        return _check_op(found, shapes, dtypes, options.seed, kwargs)
    layer, call = subject.made(found, args, kwargs)
    inputs = shapes or subject.input_shapes(layer)
    print(f"{call} on {' and '.join(str(list(shape)) for shape in inputs)}", flush=True)
    report = check_layer(layer, *inputs, dtypes=dtypes, seed=options.seed, raises=False)
    for passed in report:
        print(f"ok  {passed}")
    if report.fault is not None:
        raise report.fault
    print(f"{layer.name} passes {len(report)} checks")
    print(fused.said(layer, inputs))
    return 0


def fuse(options: Any) -> int:
    """A layer's kernels, in a file."""
    from gpulayers.authoring import fused, subject

    found = subject.found(options.target)
    if isinstance(found, Op):
        raise ValueError(f"fuse: the rule is FILE.py:Class, a layer; got the op {found.name}")
    layer, call = subject.made(found, *_arguments(options.args, "--args"))
    inputs = [_shape(text) for text in options.input_shape] or subject.input_shapes(layer)
    text = fused.write(layer, inputs, options.out)
    print(text if options.out is None else f"{options.out}: {call} on {' and '.join(str(list(s)) for s in inputs)}")
    return 0


def _check_op(op: Op, shapes: list, dtypes: list, seed: int, options: dict[str, Any]) -> int:
    from gpulayers.authoring import kernels

    if not op.required <= len(shapes) <= len(op.inputs):
        rule = f"--input-shape with a shape for each of {', '.join(op.inputs)}"
        raise ValueError(f"{op.name}: the rule is {rule}; got {len(shapes)}")
    served = kernels.held(op, shapes, dtypes, seed, options)
    print(f"ok  right, in bounds and without races: {', '.join(served)}", flush=True)
    rows = list(kernels.compiled(op, shapes, dtypes, options))
    print(f"ok  machine code\n\n{table(kernels.HEAD, rows)}" if rows else f"{op.name} has no kernel to compile")
    return 0


def _require_families(command: str, names: Sequence[str], *more: str) -> None:
    known = [*families(), *more]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{command}: no family {unknown[0]!r}; there are {', '.join(known)}")


def audit(options: Any) -> int:
    """Every kernel's machine code in figures, for GPUs that need not be there."""
    if not dispatch.installed("triton"):
        raise RuntimeError('audit: Triton and torch compile, and are not installed (pip install "gpulayers[torch]")')
    _require_families("audit", options.family)
    if options.json and (options.json.is_dir() or not options.json.absolute().parent.is_dir()):
        raise ValueError(f"audit: --json: the rule is a file in a folder that is there; got {str(options.json)!r}")
    from gpulayers.sweep import audit

    return audit(options)


def train(options: Any) -> int:
    """Train on digits or MNIST; plot, save, load again."""
    from gpulayers import demo

    data = demo.digits() if options.data == "digits" else demo.mnist(options.folder)
    result = demo.train(
        data,
        options.out or options.data,
        epochs=options.epochs,
        batch_size=options.batch_size,
        device=options.device,
        precision=options.precision,
        seed=options.seed,
    )
    print(result["history"])
    bits = "predicts the same bits" if result["same_bits"] else "predicts OTHER bits"
    print(f"\nheld-out accuracy {result['accuracy']:.2%} after {result['seconds']:.1f} s of training")
    print(f"model            {result['model']} (loaded again, it {bits})")
    print(f"learning curve   {result['plot'] or 'not drawn: matplotlib is not installed'}")
    return 0 if result["same_bits"] else 1


def export(options: Any) -> int:
    """A saved model in another format."""
    from gpulayers import demo  # noqa: F401  its layers are among those that are known
    from gpulayers.authoring.file import module_in

    for path in options.layers:
        module_in(path.resolve())
    try:
        model = gl.load(options.model)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} (--layers FILE.py)") from None
    shapes = [_shape(text) for text in options.input_shape] or None
    try:
        model.export(options.out, format=options.format, input_shapes=shapes)
    except gl.ExportError as error:  # a line for each layer
        print(f"gpulayers: {error}", file=sys.stderr)
        return 2
    path = shlex.quote(options.out) if options.format == "tfjs" else options.out
    print(f"{model.name} is in {options.out} now\n\n{NEXT_STEPS[options.format].format(path)}")
    return 0


def bench(options: Any) -> int:
    """Measure; without --cpu, --gpu or --device what there is: the GPU, else the CPU."""
    if importlib.util.find_spec("torch") is None:
        raise RuntimeError('bench: it compares with torch, which is not installed (pip install "gpulayers[torch]")')
    if any(":" in name for name in options.family):
        return _bench_own(options)
    _require_families("bench", options.family, "fused")
    from gpulayers.bench import run

    return run.bench(options)


def _bench_own(options: Any) -> int:
    from gpulayers.bench.own import bench_op

    shapes, on = [_shape(text) for text in options.input_shape], "cpu" if options.cpu else options.device or ""
    for name in options.family:
        op = _op(name)
        if not op.required <= len(shapes) <= len(op.inputs):
            rule = f"--input-shape with a shape for each of {', '.join(op.inputs)}"
            raise ValueError(f"{op.name}: the rule is {rule}; got {len(shapes)}")
        rows = bench_op(op, *shapes, dtypes=options.dtypes or ["bfloat16", "float32"], on=on)
        if any(row["status"] != "ok" for row in rows):
            return 1
    return 0


def tune(options: Any) -> int:
    """Search configurations on this GPU; without one, say which table is in use."""
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            'tune: it times Triton kernels, and Triton is not installed (pip install "gpulayers[torch]")'
        )
    if any(":" in name for name in options.family):
        return _tune_own(options)
    _require_families("tune", options.family)
    from gpulayers.bench.tuning import tune

    return tune.command(options.family, options.minutes, options.out, options.arch)


def _tune_own(options: Any) -> int:
    from gpulayers.authoring import subject
    from gpulayers.bench.tuning import fused

    (target, *more), shapes = options.family, [_shape(text) for text in options.input_shape]
    found = subject.found(target)
    if more or isinstance(found, Op) or not shapes:
        raise ValueError("tune: the rule is one FILE.py:Class, a layer, with --input-shape, batch first")
    layer, _ = subject.made(found, *_arguments(options.args, "--args"))
    return fused.command(layer, shapes, options.dtype)


if __name__ == "__main__":
    raise SystemExit(main())
