"""Text as bytes: what every Python carries, a file, or a folder of them; windows of it to train on."""

from __future__ import annotations

import os
import pathlib
from typing import NamedTuple

import numpy as np

VOCABULARY = 256
"""A token is a byte."""
MOST_HELD_OUT = 2**16


class Text(NamedTuple):
    """train, held_out: uint8, one byte of UTF-8 an element. per_character: bytes to a character, held out.

    A character that lies across the border is cut in two, which both sides keep.
    """

    train: np.ndarray
    held_out: np.ndarray
    per_character: float


def read(path: str | os.PathLike | None = None) -> Text:
    """A file, or all files of a folder that are UTF-8, by name; None: the help topics of Python, 465 thousand characters.

    The last tenth, at most 64 KiB, is held out. Raises ValueError where there is no text.
    """
    data = _topics() if path is None else _files(pathlib.Path(path))
    if not data:
        raise ValueError(f"{path}: the rule is a file of UTF-8 text, or a folder with some; got none")
    cut = len(data) - min(len(data) // 10, MOST_HELD_OUT)
    characters = len(data[cut:].decode(errors="ignore"))
    bytes_ = np.frombuffer(data, np.uint8)
    return Text(bytes_[:cut], bytes_[cut:], (len(data) - cut) / max(characters, 1))


def _topics() -> bytes:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics)).encode()


def _files(path: pathlib.Path) -> bytes:
    if not path.exists():
        raise FileNotFoundError(f"{path}: not there; the rule is a file of UTF-8 text, or a folder with some")
    names = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return b"\n".join(text for text in map(_text, names) if text)


def _text(path: pathlib.Path) -> bytes:
    """A file's bytes; none where it is no UTF-8 text."""
    data = path.read_bytes()
    try:
        data.decode()
    except UnicodeDecodeError:
        return b""
    return b"" if b"\0" in data else data


def windows(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """All windows of ``length`` tokens, and the token after each of theirs: two views (N, length), N = T − length.

    Raises ValueError where there are not enough tokens for one.
    """
    if len(tokens) <= length:
        raise ValueError(f"text: the rule is more bytes than a context of {length} in each part; got {len(tokens)}")
    return tuple(np.lib.stride_tricks.sliding_window_view(part, length) for part in (tokens[:-1], tokens[1:]))  # type: ignore[return-value]


def each_once(tokens: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows that lie side by side: each token is predicted once, but for those left at the end."""
    x, y = windows(tokens, length)
    return x[::length], y[::length]
