"""Where the layer's own code raised, and what is behind it most often."""

from __future__ import annotations

import difflib
import pathlib
import re
import traceback

import numpy as np

import gpulayers.kernels as kernels
import gpulayers.layers as layers

_OURS = (str(pathlib.Path(layers.__path__[0]).parent), kernels.__path__[0], str(pathlib.Path(np.__file__).parent))
"""Where code lies that is not the caller's."""

CAUSES: tuple[tuple[type[Exception], str, str], ...] = (
    (
        ValueError,
        r"not enough values to unpack \(expected \d+, got 0\)",
        "nothing was kept for it: forward must call self.save(…), in the same class (self.saved_by(Base) has a base class's)",
    ),
    (
        ValueError,
        r"values to unpack",
        "backward takes another number of arrays from self.saved than forward gave to self.save(…)",
    ),
    (
        ValueError,
        r"non-broadcastable output operand",
        "what is added to a weight's gradient has more axes: sum over the batch, and over all that shares the weight",
    ),
    (ValueError, r"could not be broadcast", "a sum over an axis without keepdims=True loses it, and shifts the others"),
    (ValueError, r"a shape of integers ≥ 0; got .*None", "the batch is not known in build: leave input_shape[0] out"),
    (TypeError, r"\.build\(\) (takes|missing)", "it is build(self, input_shape), with one shape for each input"),
    (TypeError, r"(forward|backward)\(\) (takes|missing)", "it is forward(self, x) and backward(self, dy)"),
    (TypeError, r"forward returned None", "a return is missing"),
    (TypeError, r"NoneType", "something that should return an array returns None"),
)


def place(error: BaseException) -> str:
    """The last line of the caller's own code that an error passed through, as "my_layer.py:7: return x.y"; "" without one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((*_OURS, "<"))]
    return f"{pathlib.Path(frames[-1].filename).name}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def cause(error: BaseException) -> str:
    """The likely cause of an exception in words; "" where none is known."""
    if isinstance(error, AttributeError) and error.name and hasattr(error.obj, "add_weight"):
        near = difflib.get_close_matches(error.name, vars(error.obj), 1)
        makes = f'build or __init__ must make it, as in self.{error.name} = self.add_weight("{error.name}", …)'
        return f"it is called {near[0]}" if near else makes
    text = str(error)
    found = (words for kind, pattern, words in CAUSES if isinstance(error, kind) and re.search(pattern, text))
    return next(found, "")


def explained(error: BaseException | None) -> str:
    """Place and cause, as the end of a sentence."""
    if error is None:
        return ""
    at, why = place(error), cause(error)
    return (f" (at {at})" if at else "") + (f"; the likely cause: {why}" if why else "")
