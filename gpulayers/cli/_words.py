"""What is said on a command line, read: shapes, ops, arguments of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpulayers import arrays
from gpulayers.arrays import Spec
from gpulayers.inventory import families, ops
from gpulayers.ops._op import Op


def op(name: str) -> Op:
    """One of the library's, or of one's own in FILE.py:name."""
    if ":" in name:
        from gpulayers.authoring import subject

        own = subject.found(name)
        if not isinstance(own, Op):
            raise ValueError(f"the rule is FILE.py:op, made by gl.op; got {name!r}")
        return own
    found = {op.name: op for op in ops()}
    if name not in found:
        raise ValueError(f"no op {name!r}; there are {', '.join(found)}")
    return found[name]


def specs(words: Sequence[str], dtype: str) -> list[Any]:
    """Specs of an op's inputs, None for "-", a list of them for what stands in brackets."""
    found: list[Any] = []
    into = found
    for word in words:
        opens, closes = word.startswith("["), word.endswith("]")
        if opens == (into is not found) and (opens or closes):
            raise ValueError(f"--shapes: the rule is a list as [8 3,4]; got {' '.join(words)}")
        if opens:
            into = []
            found.append(into)
        inner = word.removeprefix("[").removesuffix("]")
        sizes, _, own = inner.partition(":")
        if sizes or inner == word:
            into.append(None if sizes == "-" else Spec(shape(sizes), arrays.dtype(own or dtype)))
        if closes:
            into = found
    if into is not found:
        raise ValueError(f"--shapes: the rule is a list as [8 3,4]; got {' '.join(words)}")
    return found


def arguments(text: str, option: str) -> tuple[tuple, dict[str, Any]]:
    """What stands between the brackets of a call."""
    try:
        return eval(f"(lambda *a, **k: (a, k))({text})", {})
    except Exception as error:
        raise ValueError(f"{option}: the rule is arguments as in 16, bias=False; got {text!r} ({error})") from None


def shape(text: str) -> tuple[int, ...]:
    """8,3,32 or 8x3x32, in parentheses or not; "" and () are the shape of a number."""
    inner = text.strip().removeprefix("(").removesuffix(")")
    words = inner.replace("x", ",").removesuffix(",").split(",") if inner.strip() else []
    if not all(n.strip().isdecimal() for n in words):
        raise ValueError(f"the rule is a shape of integers ≥ 0, as in 8,3,32,32; got {text!r}")
    return tuple(map(int, words))


def require_families(command: str, names: Sequence[str], *more: str) -> None:
    known = [*families(), *more]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{command}: no family {unknown[0]!r}; there are {', '.join(known)}")
