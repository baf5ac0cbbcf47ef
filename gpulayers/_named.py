"""Functions made from one pattern, for ops that differ in a name and a few options only."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def named(function: Any, name: str, options: Mapping[str, Any], like: Any = None) -> Any:
    """``function``, whose ``**options`` have these names and defaults, under a name of its own.

    like: the function whose docstring and module it takes.
    """
    own = inspect.signature(function)
    parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    parameters += [inspect.Parameter(k, inspect.Parameter.KEYWORD_ONLY, default=v) for k, v in options.items()]
    function.__name__ = function.__qualname__ = name
    function.__signature__ = own.replace(parameters=parameters)
    if like is not None:
        function.__doc__, function.__module__ = like.__doc__, like.__module__
    return function
