"""The module in a file, wherever it lies."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import pathlib
import sys
import traceback
from typing import Any


def module_in(path: pathlib.Path) -> Any:
    """The module in a file, which imports its neighbours as a script does, and relatively as part of its package.

    Raises ImportError, whose text names the line.
    """
    root, names = path.parent, [path.stem]
    while (root / "__init__.py").is_file():
        root, names = root.parent, [root.name, *names]
    sys.path[:0] = [str(path.parent), str(root)]
    name = ".".join(names)
    if name in sys.modules and getattr(sys.modules[name], "__file__", None) != str(path):
        name = f"_{name}"  # the name is another module's
    try:
        if len(names) > 1:
            importlib.import_module(".".join(names[:-1]))
        loader = importlib.machinery.SourceFileLoader(name, str(path))
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        where = f"{path}:{at[-1]}" if at else path
        raise ImportError(f"{where}: {type(error).__name__}: {error}") from error
    return module
