"""The command line: gpulayers info | explain | new | check | fuse | train | generate | export | bench | tune | audit."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import gpulayers as gl
from gpulayers import _console, dispatch
from gpulayers.cli import _info, _lab, _own, _train
from gpulayers.cli._info import ops_markdown

__all__ = ["main", "ops_markdown"]

WRONG_INPUT = (RuntimeError, ValueError, TypeError, LookupError, OSError, ImportError, ArithmeticError, MemoryError)
"""What a command raises where it cannot do what was asked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0; 1 where it found something wrong; 2 where it could not run.

    The reason is one line on stderr.
    """
    _console.any_encoding()
    options = _parser().parse_args(argv)
    try:
        dispatch.permitted()
        status = options.run(options)
        sys.stdout.flush()  # a pipe that was closed shows here, not when Python ends
        return status
    except BrokenPipeError:
        _console.closed_pipe()
        return 1
    except KeyboardInterrupt:
        print("gpulayers: interrupted", file=sys.stderr)
        return 130
    except AssertionError as error:  # a layer that is wrong
        print(f"gpulayers: {error}", file=sys.stderr)
        return 1
    except WRONG_INPUT as error:
        print(f"gpulayers: {_console.one_line(error)}", file=sys.stderr)
        return 2


def _parser() -> _console.Parser:
    parser = _console.Parser(prog="gpulayers", description=gl.__doc__)
    parser.add_argument("--version", action="version", version=gl.__version__)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (_info, _own, _train, _lab):
        module.add(commands)
    return parser
