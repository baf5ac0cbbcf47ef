"""Faults in CUDA C++ kernels: found by patterns in the code, comments, texts and the preprocessor's lines left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Change = tuple[str, int, int, bytes]
"""(kind, start, end, new text)."""

SKIPPED = re.compile(
    rb"//[^\n]*|/\*.*?\*/"  # comments
    rb'|"(?:\\.|[^"\\\n])*"'  # texts
    rb"|^[ ]*#(?:include|pragma|ifdef|ifndef|if|line)[^\n]*"
    rb"|^[ ]*#else\b.*?^[ ]*#endif[^\n]*"  # what only a GPU runs
    rb"|^[ ]*#define (?:[^\n]*\\\n)*[^\n]*",  # the instances of a template, and lists of arguments
    re.S | re.M,
)
SWAPPED = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
OTHER = {b"_h": b"_w", b"_w": b"_h", b"_n": b"_c", b"_c": b"_n"}


def _fixed(new: bytes) -> Callable[[re.Match[bytes]], bytes]:
    return lambda match: new


def _one_more(match: re.Match[bytes]) -> bytes:
    text = match[0]
    return str(int(text) + 1).encode() if text.isdigit() else b"(2 * %b + (%b == 0))" % (text, text)


PATTERNS: list[tuple[str, bytes, Callable[[re.Match[bytes]], bytes]]] = [
    ("comparison", rb"(?<= )(?:<=|>=|==|!=|<|>)(?= )", lambda m: SWAPPED[m[0].decode()].encode()),
    ("condition", rb"&&(?= [^&]*[;{]|[^\n]*\n)", _fixed(b"||")),
    ("condition", rb"\|\|", _fixed(b"&&")),
    ("condition", rb"(?<=if \()!", _fixed(b"")),
    ("condition", rb"(?<=if \()(?=\w+\))", _fixed(b"!")),
    ("narrow", rb"\(int64\)", _fixed(b"")),
    ("narrow", rb"\bint64(?= \w+ = )", _fixed(b"int")),
    ("narrow", rb"\blong long\b", _fixed(b"int")),
    ("accumulator", rb"\bfloat(?= (?:sum|square|total|dot|[ab]) = )", _fixed(b"_Float16")),
    ("sign", rb"(?<= )\+(?= )", _fixed(b"-")),
    ("sign", rb"(?<= )-(?= )", _fixed(b"+")),
    ("term", rb"(?<= )[+-]=(?= )", _fixed(b"=")),
    ("term", rb" [+-] \w+(?:\.\w+)?(?= \* | / )", _fixed(b" + 0")),
    ("term", rb" [+-] [\w.]+(?=[;,)])", _fixed(b"")),
    ("factor", rb" [*/] [\w.]+(?=[;,) ])", _fixed(b"")),
    ("constant", rb"(?<![\w.\[<])\d+(?:\.\d*f?)?(?![\w.xu\]>])", _one_more),
    ("min-max", rb"\bf?min(?=f?\()", lambda m: m[0].replace(b"min", b"max")),
    ("min-max", rb"\bf?max(?=f?\()", lambda m: m[0].replace(b"max", b"min")),
    ("swapped", rb"(?<=[a-z]\.)\w+?(_[hwnc])\b", lambda m: m[0][:-2] + OTHER[m[1]]),
    ("swapped", rb"(?<=[(,] )(\w+), (\w+)(?=[,)])|(?<=\()(\w+), (\w+)(?=[,)])", lambda m: _swap(m)),
    ("barrier", rb"__syncthreads\(\)", _fixed(b"")),
]


def _swap(match: re.Match[bytes]) -> bytes:
    a, b = (g for g in match.groups() if g is not None)
    return b"%b, %b" % (b, a)


def faults(source: bytes) -> Iterator[Change]:
    code = SKIPPED.sub(lambda m: re.sub(rb"[^\n]", b" ", m[0]), source)
    for kind, pattern, change in PATTERNS:
        for match in re.finditer(pattern, code):
            line = code[code.rfind(b"\n", 0, match.start()) + 1 : code.find(b"\n", match.end())]
            if not line.lstrip().startswith((b"template", b"using", b"constexpr", b"extern")):
                yield kind, match.start(), match.end(), change(match)
