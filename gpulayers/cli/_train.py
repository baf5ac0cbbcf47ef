"""Commands that train, and that write what was trained for elsewhere."""

from __future__ import annotations

import codecs
import itertools
import pathlib
import shlex
import sys
from typing import Any

import gpulayers as gl
from gpulayers import _console, demo, language  # their layers are among those that are known
from gpulayers.cli import _words
from gpulayers.export import FORMATS, NEXT_STEPS


def add(commands: Any) -> None:
    p = commands.add_parser("train", help="train a network on handwritten digits, or a language model on text")
    kinds = p.add_subparsers(dest="data", required=True)
    _images(kinds)
    _text(kinds)

    p = commands.add_parser("generate", help="let a trained language model go on with a text")
    p.add_argument("folder", metavar="run", type=pathlib.Path, help="the folder that `gpulayers train text` wrote")
    p.add_argument("prompt", nargs="?", default="", help="what it goes on from")
    p.add_argument("--tokens", type=_console.at_least(0), default=400, help="how many bytes to write")
    p.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    p.add_argument("--top-k", type=_console.at_least(1), help="draw from the k likeliest only")
    p.add_argument("--top-p", type=float, help="draw from the fewest that have this share together")
    p.add_argument("--seed", type=_console.at_least(0), default=0)
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    p.set_defaults(run=_generate)

    p = commands.add_parser("export", help="write a saved model for elsewhere: Node.js, browsers, onnxruntime")
    p.add_argument("model", help="the folder that gl.save wrote")
    p.add_argument("--format", choices=sorted(FORMATS), default="tfjs")
    p.add_argument("--out", required=True, help="where to write it to")
    p.add_argument("--layers", action="append", default=[], type=pathlib.Path, help="FILE.py with layers of your own")
    p.add_argument("--input-shape", nargs="+", default=(), help="batch first, if the model was never called")
    p.set_defaults(run=_export)


def _images(kinds: Any) -> None:
    for name in ("digits", "mnist"):
        p = kinds.add_parser(name, help="the demonstration network on handwritten digits")
        p.add_argument("--data", dest="folder", default="mnist-data", help="folder with MNIST's four IDX files")
        p.add_argument("--out", default=None, help="folder to write to (default: the name of the data)")
        p.add_argument("--epochs", type=_console.at_least(1), default=15)
        p.add_argument("--batch-size", type=_console.at_least(1), default=64)
        _where(p)
        p.set_defaults(run=_train)


def _where(p: Any) -> None:
    p.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1")
    p.add_argument("--precision", choices=["bfloat16", "float16"], default=None)
    p.add_argument("--seed", type=_console.at_least(0), default=0)


def _text(kinds: Any) -> None:
    p = kinds.add_parser("text", help="a small GPT on English text, byte by byte")
    p.add_argument("--data", dest="path", help="a file or a folder of UTF-8 text (default: Python's help topics)")
    p.add_argument("--out", default="text", help="folder to write to")
    p.add_argument("--torch", action="store_true", help="by torch and gpulayers.torch, in place of native layers")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    count = _console.at_least(1)
    for name, what in {
        "epochs": "how often to report and to write a checkpoint",
        "steps": "batches an epoch",
        "batch-size": "windows of text a batch",
        "context": "bytes that the model sees",
        "width": "numbers for each byte",
        "layers": "blocks of attention and MLP",
        "heads": "of attention, in each block",
    }.items():
        default = getattr(language.Settings, name.replace("-", "_"))
        p.add_argument(f"--{name}", type=count, default=default, help=f"{what} (default: {default})")
    p.add_argument("--lr", type=_console.positive, default=language.Settings.lr, help="the highest learning rate")
    p.add_argument(
        "--optimizer", choices=language.OPTIMIZERS, default="adamw", help="for the matrices (default: adamw)"
    )
    _where(p)
    p.set_defaults(run=_train_text)


def _train_text(options: Any) -> int:
    """Train a language model; report, plot, save."""
    names = language.Settings.__dataclass_fields__
    settings = language.Settings(**{k: v for k, v in vars(options).items() if k in names})
    text = language.read(options.path)
    try:
        result = language.train(text, options.out, settings, resume=options.resume, torch=options.torch)
    except KeyboardInterrupt:
        print(f"\ninterrupted: the same command with --resume goes on from {options.out}", file=sys.stderr)
        return 130
    out = shlex.quote(options.out)
    print(f"\n{result['bits']:.3f} bits per character held out, after {result['seconds']:.1f} s of training")
    print(f"model            {result['model']}")
    print(_curve(result))
    print(f'go on            gpulayers generate {out} "Python is"')
    return 0


def _curve(result: dict[str, Any]) -> str:
    return f"learning curve   {result['plot'] or 'not drawn: matplotlib is not installed'}"


def _generate(options: Any) -> int:
    """A prompt, and what a model makes of it, as it comes."""
    model = gl.load(options.folder / "model").to(options.device)
    prompt = options.prompt.encode()
    more = language.generate(
        model,
        prompt,
        options.tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in itertools.chain([prompt], more):
        print(decoder.decode(piece), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return 0


def _train(options: Any) -> int:
    """Train on digits or MNIST; plot, save, load again."""
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
    print(_curve(result))
    return 0 if result["same_bits"] else 1


def _export(options: Any) -> int:
    """A saved model in another format."""
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
