"""What stands between a command and its terminal: text in whatever encoding there is, errors in one line."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import os
import sys
import unicodedata
from typing import Any, NoReturn

_NEAREST = {"─": "-", "−": "-", "–": "-", "·": "*", "×": "x", "µ": "u", "μ": "u", "≤": "<=", "≥": ">=", "∈": "in"}
_NEAREST |= {
    "→": "->",
    "←": "<-",
    "√": "sqrt",
    "Σ": "sum",
    "∏": "prod",
    "∞": "inf",
    "⌊": "floor(",
    "⌋": ")",
    "⌈": "ceil(",
    "⌉": ")",
}


def nearest(text: str) -> str:
    """The text in ASCII, for people: "x ≥ 2σ" is "x >= 2sigma"."""
    return "".join(map(_nearest, text))


def _nearest(c: str) -> str:
    if c.isascii() or c in _NEAREST:
        return _NEAREST.get(c, c)
    name = unicodedata.name(c, "")
    if name.startswith("GREEK"):
        return name.split()[-1].lower()
    return unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() or "?"


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return nearest(error.object[error.start : error.end]), error.end


codecs.register_error("gpulayers.nearest", _replace)


def any_encoding() -> None:
    """What the encoding of stdout or stderr does not have is shown in ASCII from now on, in place of an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="gpulayers.nearest")


def one_line(error: BaseException) -> str:
    """What an error says, in one line."""
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    lines = [line.strip() for line in str(said).splitlines()]
    return " ".join(filter(None, lines)) or type(error).__name__


def closed_pipe() -> None:
    """The reader of stdout is gone: what is still to be written goes nowhere."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists what there is)\n")


def at_least(least: int) -> Any:
    """The type of an option that is an integer ≥ ``least``."""

    def parse(text: str) -> int:
        with contextlib.suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"the rule is an integer ≥ {least}; got {text!r}")

    return parse


def positive(text: str) -> float:
    """The type of an option that is a number above 0, infinity included."""
    with contextlib.suppress(ValueError):
        if float(text) > 0:
            return float(text)
    raise argparse.ArgumentTypeError(f"the rule is a number > 0; got {text!r}")
