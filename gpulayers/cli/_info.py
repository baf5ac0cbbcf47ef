"""Commands that say what is here, and who would compute an op."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np

import gpulayers as gl
from gpulayers import dispatch
from gpulayers._table import table
from gpulayers.cli import _words
from gpulayers.inventory import PACKAGES, backends_of, ops, version


def add(commands: Any) -> None:
    commands.add_parser("info", help="devices, packages, and which backend has each op").set_defaults(run=_info)

    p = commands.add_parser("explain", help="who would compute an op here, and why")
    p.add_argument("op", help="the op's name, as in gpulayers.ops: softmax, conv, …; or FILE.py:op, one of your own")
    shapes = "shapes of its inputs: 8,3,32,32 16,3,3,3; - for None, 8:int64 for another dtype, [8 3,4] for a list"
    p.add_argument("--shapes", default="", help=shapes, nargs="*")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--options", default="", help='as in "kernel_size=2, stride=(1, 2)"')
    p.set_defaults(run=_explain)


def _info(options: Any) -> int:
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


def _explain(options: Any) -> int:
    """Who would compute the op, for CPU arrays and for CUDA arrays."""
    op = _words.op(options.op)
    defaults = [n if n in op.needed else f"{n}={v!r}" for n, v in op.options.items()]
    about = f"{op.family}.{op.name}({', '.join(op.inputs)}{'; ' if defaults else ''}{', '.join(defaults)})"
    text = "\n".join([about, *(line.strip() for line in (op.__doc__ or "").strip().splitlines())])
    if not options.shapes:
        print(
            f"{text}\n\nkernels: {', '.join(backends_of(op)) or 'none'}, and the definition; give --shapes for the choice"
        )
        return 0
    positional, given = _words.arguments(options.options, "--options")
    if positional:
        raise ValueError(f"--options: the rule is name=value, …; got {options.options!r}")
    specs = _words.specs(options.shapes, options.dtype)
    try:
        backend, reasons = dispatch.explain(op, *specs, **given)
    except AttributeError as error:  # a list where an array must be
        came = " ".join(options.shapes)
        raise TypeError(f"{op.name}: --shapes: the rule is a list only for an input that is one; got {came}") from error
    chosen = table(["backend", "for these arrays on the CPU"], [*reasons.items(), [backend, "computes it"]])
    print(f"{text}\n\n{chosen}")
    return 0
