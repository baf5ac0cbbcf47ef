"""Commands for layers and ops of one's own: start one, check it, write its kernels."""

from __future__ import annotations

import pathlib
import shlex
from typing import Any

from gpulayers import _console, arrays
from gpulayers._table import table
from gpulayers.cli import _words
from gpulayers.ops._op import Op


def add(commands: Any) -> None:
    p = commands.add_parser("new", help="write a layer of your own, and its test, to start from")
    p.add_argument("name", help="of its class, as MyLayer; the files are my_layer.py and test_my_layer.py")
    neurons = (
        'neuron type: "fully connected", convolutional, pooling or elementwise (default); fc, conv and pool do, too'
    )
    p.add_argument("--neuron", default="elementwise", help=neurons)
    p.add_argument("--kernel", choices=["triton", "cuda"], help="with a kernel of its own (elementwise)")
    p.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."), help="folder to write to (default: this one)")
    p.set_defaults(run=_new)

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
    p.set_defaults(run=_check)

    p = commands.add_parser("fuse", help="write a layer's array code as Triton kernels, to read or to go on by hand")
    p.add_argument("target", help="FILE.py:Class")
    p.add_argument("--args", default="", help="arguments of the class, as for check")
    p.add_argument("--input-shape", default=(), nargs="+", help=shape)
    p.add_argument("--out", type=pathlib.Path, help="the file to write (default: it is printed)")
    p.set_defaults(run=_fuse)


def _new(options: Any) -> int:
    """A layer and its test, to start from."""
    from gpulayers.authoring import new

    layer, test = new(options.name, options.neuron, options.out, options.kernel)
    print(f"{layer}\n{test}\n\nedit it, then: gpulayers check {shlex.quote(f'{layer}:{options.name}')}")
    return 0


def _check(options: Any) -> int:
    """check_layer on a class in a file; the kernels of an op in it against its definition."""
    from gpulayers.authoring import fused, subject
    from gpulayers.testing import check_layer

    args, kwargs = _words.arguments(options.args, "--args")
    dtypes = list(map(arrays.dtype, options.dtypes))
    shapes = [_words.shape(text) for text in options.input_shape]
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


def _fuse(options: Any) -> int:
    """A layer's kernels, in a file."""
    from gpulayers.authoring import fused, subject

    found = subject.found(options.target)
    if isinstance(found, Op):
        raise ValueError(f"fuse: the rule is FILE.py:Class, a layer; got the op {found.name}")
    layer, call = subject.made(found, *_words.arguments(options.args, "--args"))
    inputs = [_words.shape(text) for text in options.input_shape] or subject.input_shapes(layer)
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
