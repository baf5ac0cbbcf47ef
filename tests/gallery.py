"""The gallery of custom layers, examples/custom_layers, as the tests use it."""

from __future__ import annotations

import contextlib
import importlib
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import gpulayers as gl
from gpulayers.layers import _config

FOLDER = pathlib.Path(__file__).parents[1] / "examples/custom_layers"


class Entry(NamedTuple):
    """A layer of the gallery: its module, its class, arguments and an input shape to check it with."""

    module: str
    name: str
    arguments: tuple
    input_shape: tuple

    @property
    def path(self) -> pathlib.Path:
        return FOLDER / f"{self.module}.py"

    def layer(self) -> gl.Layer:
        return getattr(importlib.import_module(self.module), self.name)(*self.arguments)

    def model(self) -> gl.Sequential:
        """With the layer in it, for images (N, 1, 8, 8) of ten digits."""
        return importlib.import_module(self.module).model()


ENTRIES = [
    Entry("antirectifier", "Antirectifier", (), (None, 5)),
    Entry("blur_pool", "BlurPool", (), (None, 2, 5, 4)),
    Entry("dynamic_filter", "DynamicFilter", (), (None, 2, 4, 3)),
    Entry("kan", "KAN", (4, 3), (None, 4)),
    Entry("linear_attention", "LinearAttention", (), (None, 3, 4)),
    Entry("maxout", "Maxout", (5, 3), (None, 5)),
    Entry("squeeze_excitation", "SqueezeExcitation", (2,), (None, 4, 3, 3)),
    Entry("swish", "Swish", (), (None, 5)),
    Entry("symlog", "Symlog", (), (None, 5)),
]


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """The gallery's modules can be imported, and go with the names that they registered."""
    path, registry, own = list(sys.path), dict(_config._registry), [path.stem for path in FOLDER.glob("*.py")]
    before = {name: sys.modules.pop(name) for name in own if name in sys.modules}  # they register when they are loaded
    for name in {entry.name for entry in ENTRIES} & _config._registry.keys():
        del _config._registry[name]  # another test's
    sys.path.insert(0, str(FOLDER))
    try:
        yield
    finally:
        sys.path[:] = path
        _config._registry.clear()
        _config._registry.update(registry)
        for name in own:
            sys.modules.pop(name, None)
        sys.modules.update(before)


def digits(count: int) -> tuple[Any, Any]:
    """The first ``count`` of scikit-learn's digits: images (N, 1, 8, 8), labels (N,)."""
    from gpulayers.demo import digits as all_digits

    x, y, _, _ = all_digits()
    return x[:count], y[:count]
