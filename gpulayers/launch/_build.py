"""Builds the C source of the tapes: by Triton's own build step, which builds its launcher so, else by the C compiler."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from gpulayers import _files


def built(name: str, text: str) -> Any:
    """The extension module ``name`` of a C source, kept on disk. Raises what building raises."""
    if importlib.util.find_spec("triton") is None:
        return _built_here(name, text)
    from triton.runtime.build import compile_module_from_src

    return compile_module_from_src(text, name)


def _built_here(name: str, text: str) -> Any:
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    folder = _files.cache("launch")
    path = folder / (hashlib.sha256(f"{suffix}\n{text}".encode()).hexdigest()[:32] + suffix)
    if not path.exists():
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
        if compiler is None:
            raise RuntimeError("no C compiler: gcc, clang or cc, or CC=…")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # processes may build it at the same time
            flags = ["-O3", "-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", "-x", "c", "-"]
            new = Path(scratch) / path.name
            subprocess.run([compiler, *flags, "-o", str(new)], input=text.encode(), check=True, capture_output=True)
            os.replace(new, path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
