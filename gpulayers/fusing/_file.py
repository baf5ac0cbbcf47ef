"""The file of a layer's kernels: what a person reads, and Triton compiles."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.resources
import importlib.util
import os
import pathlib
import sys
import tempfile
import threading
from collections.abc import Sequence
from typing import Any

from gpulayers._files import cache, write_whole
from gpulayers.fusing._expression import HELPERS
from gpulayers.fusing._kernel import Kernel

_DRAWING = ("_draw", "word_of", "_words_of")
_lock = threading.Lock()
_modules: dict[str, Any] = {}


def file_text(docstring: str, kernels: Sequence[Kernel]) -> str:
    """Imports, what the kernels call, and the kernels."""
    used = {name for k in kernels for name in k.helpers}
    known = HELPERS | (philox() if "_draw" in used else {})
    helpers = [text for name, text in known.items() if name in used]
    texts = [k.text for k in kernels]
    imports = ["import triton", "import triton.language as tl"]
    if any("libdevice." in text for text in texts):
        imports.append("from triton.language.extra import libdevice")
    return "\n".join([f'"""{docstring}"""', "", *imports, "", "", "\n\n".join([*helpers, *texts])])


@functools.cache
def philox() -> dict[str, str]:
    """The library's own functions that draw random words, as text: a file of kernels needs nothing but Triton."""
    text = (importlib.resources.files("gpulayers.kernels") / "triton" / "_random.py").read_text(encoding="utf-8")
    lines = text.splitlines()
    functions = [f for f in ast.parse(text).body if isinstance(f, ast.FunctionDef) and f.name in _DRAWING]
    return {f.name: "\n".join([*lines[f.lineno - 2 : f.end_lineno], ""]) for f in functions}


def key_of(name: str, text: str) -> str:
    """What files of these kernels are called."""
    return f"{name}_{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def module_of(name: str, text: str) -> Any:
    """The module that has this text, imported from a file of its own."""
    key = key_of(name, text)
    with _lock:
        if key not in _modules:
            _modules[key] = _imported(f"gpulayers_fused_{key}", _written(f"{key}.py", text))
        return _modules[key]


def _written(name: str, text: str) -> pathlib.Path:
    for place in (cache("fused"), pathlib.Path(tempfile.gettempdir()) / f"gpulayers-fused-{os.getuid()}"):
        path = place / name
        try:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_whole(path, text.encode())
            return path
        except OSError:  # a home that cannot be written to
            continue
    raise OSError(f"fuse: the rule is a folder that can be written to, as GPULAYERS_CACHE names; got {cache('fused')}")


def _imported(name: str, path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
