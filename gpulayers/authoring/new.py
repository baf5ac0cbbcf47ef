"""``gpulayers new``: a layer that runs, and its test, to start from."""

from __future__ import annotations

import contextlib
import keyword
import pathlib
import re
import sys
import unicodedata
from typing import NamedTuple

import gpulayers as gl

TEMPLATES = pathlib.Path(__file__).parent / "templates"


class Neuron(NamedTuple):
    """A neuron type: its names, and the arguments and the input shape of its template's test."""

    template: str
    names: tuple[str, ...]
    arguments: str
    input_shape: str


NEURONS = (
    Neuron("fully_connected", ("fully connected", "fc", "dense", "linear"), "6, 5", "(None, 6)"),
    Neuron("convolutional", ("convolutional", "convolution", "conv"), "3, 4", "(None, 3, 6, 5)"),
    Neuron("pooling", ("pooling", "pool"), "", "(None, 3, 6, 4)"),
    Neuron("elementwise", ("elementwise", "activation", "none"), "", "(None, 6)"),
)

TEST = '''"""MyLayer against finite differences, and in all that a layer may meet: pytest test_my_layer.py"""

from gpulayers.testing import check_layer
from my_layer import MyLayer


def test_my_layer():
    check_layer(MyLayer({arguments}), {input_shape})
'''


KERNELS = ("triton", "cuda")


def new(
    name: str, neuron: str = "elementwise", folder: str | pathlib.Path = ".", kernel: str | None = None
) -> list[pathlib.Path]:
    """Write a layer called ``name`` and its test into a folder; returns the two files.

    neuron: "fully connected", "convolutional", "pooling", "elementwise", or a short name of one. kernel: "triton" or
    "cuda", for an elementwise layer with an op and a kernel of its own.

    Raises ValueError for a name that is none, FileExistsError where one of the files is there: nothing is written then.
    """
    kind, name = _neuron(neuron), _checked(unicodedata.normalize("NFKC", name))
    module = _module_name(name)
    _not_hidden(name, module)
    if kernel is not None and (kind.template != "elementwise" or kernel not in KERNELS):
        raise ValueError(
            f"new: --kernel: the rule is triton or cuda, with an elementwise layer; got {kernel!r}, {neuron!r}"
        )
    which = kind.template if kernel is None else f"{kernel}_kernel"
    template = (TEMPLATES / f"{which}.py").read_text(encoding="utf-8")
    test = TEST.format(arguments=kind.arguments, input_shape=kind.input_shape)
    texts = {pathlib.Path(folder) / f"{module}.py": template, pathlib.Path(folder) / f"test_{module}.py": test}
    for path in texts:
        if path.exists():
            raise FileExistsError(f"new: {path} exists, and is not overwritten")
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as half:  # both files or none
        for path, text in texts.items():
            with open(path, "x", encoding="utf-8") as file:
                half.callback(path.unlink)
                file.write(text.replace("MyLayer", name).replace("my_layer", module))
        half.pop_all()
    return list(texts)


def _neuron(said: str) -> Neuron:
    for kind in NEURONS:
        if " ".join(said.lower().replace("_", " ").split()) in kind.names:
            return kind
    rule = " or ".join(", ".join(f'"{kind.names[0]}"' for kind in NEURONS).rsplit(", ", 1))
    raise ValueError(f"new: --neuron: the rule is {rule}; got {said!r}")


def _checked(name: str) -> str:
    if not name.isidentifier() or keyword.iskeyword(name) or name[0] != name[0].upper() or name[0] == "_":
        raise ValueError(f"new: the rule is the name of a class, as MyLayer; got {name!r}")
    if hasattr(gl, name):
        raise ValueError(f"new: the rule is a name that gpulayers does not have; got {name!r}")
    return name


def _module_name(name: str) -> str:
    """MyLayer → my_layer, RBFLayer → rbf_layer."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _not_hidden(name: str, module: str) -> None:
    """A file beside a script comes before Python's own modules of that name."""
    if module in sys.stdlib_module_names or module in ("gpulayers", "numpy", "torch", "triton", "cupy"):
        raise ValueError(f"new: {module}.py would hide the module {module}: the rule is another name; got {name!r}")
