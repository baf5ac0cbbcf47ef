"""Commands that train, and that write what was trained for elsewhere."""

from __future__ import annotations

import pathlib
import shlex
import sys
from typing import Any

import gpulayers as gl
from gpulayers import _console
from gpulayers.cli import _words
from gpulayers.export import FORMATS, NEXT_STEPS


def add(commands: Any) -> None:
    p = commands.add_parser("train", help="train the demonstration network on handwritten digits")
    p.add_argument("data", choices=["digits", "mnist"])
    p.add_argument("--data", dest="folder", default="mnist-data", help="folder with MNIST's four IDX files")
    p.add_argument("--out", default=None, help="folder to write to (default: the name of the data)")
    p.add_argument("--epochs", type=_console.at_least(1), default=15)
    p.add_argument("--batch-size", type=_console.at_least(1), default=64)
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    p.add_argument("--precision", choices=["bfloat16", "float16"], default=None)
    p.add_argument("--seed", type=_console.at_least(0), default=0)
    p.set_defaults(run=_train)

    p = commands.add_parser("export", help="write a saved model for elsewhere: Node.js, browsers, onnxruntime")
    p.add_argument("model", help="the folder that gl.save wrote")
    p.add_argument("--format", choices=sorted(FORMATS), default="tfjs")
    p.add_argument("--out", required=True, help="where to write it to")
    p.add_argument("--layers", action="append", default=[], type=pathlib.Path, help="FILE.py with layers of your own")
    p.add_argument("--input-shape", nargs="+", default=(), help="batch first, if the model was never called")
    p.set_defaults(run=_export)


def _train(options: Any) -> int:
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


def _export(options: Any) -> int:
    """A saved model in another format."""
    from gpulayers import demo  # noqa: F401  its layers are among those that are known
    from gpulayers.authoring.file import module_in

    for path in options.layers:
        module_in(path.resolve())
    try:
        model = gl.load(options.model)
    except KeyError as error:
        raise ValueError(f"{error.args[0]} (--layers FILE.py)") from None
    shapes = [_words.shape(text) for text in options.input_shape] or None
    try:
        model.export(options.out, format=options.format, input_shapes=shapes)
    except gl.ExportError as error:  # a line for each layer
        print(f"gpulayers: {error}", file=sys.stderr)
        return 2
    path = shlex.quote(options.out) if options.format == "tfjs" else options.out
    print(f"{model.name} is in {options.out} now\n\n{NEXT_STEPS[options.format].format(path)}")
    return 0
