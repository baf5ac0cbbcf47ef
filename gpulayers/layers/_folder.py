"""Folders that are written whole or not at all, even where the folder itself cannot be renamed (a mount point).

What is new is written to ``.new`` inside the folder and, once it is complete, called ``.whole``: from then on that is
what the folder holds. Its files are then put into their places one by one, each atomically; last, ``.whole`` goes. So
whatever interrupts this, ``recovered`` finds all of the earlier files or all of the new ones.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

NEW, WHOLE, DONE = ".new", ".whole", ".done"


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike, names: frozenset[str], alone: bool = True) -> Iterator[pathlib.Path]:
    """A fresh folder to write into; its files replace those of ``path`` when the block ends well, else they are removed.

    names: of the files that may be in there. Raises FileExistsError for a file, and for a folder that holds anything else
    (but for what file systems keep there: hidden files, lost+found). alone: False where other files may be there, and stay.
    """
    target = _real(path)
    if alone or target.is_file():
        _require_ours(target, names)
    fresh, staged = not target.exists(), target / NEW
    target.mkdir(parents=True, exist_ok=True)
    try:
        _publish(target, names)  # an earlier save that was interrupted
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        yield staged
        for file in staged.iterdir():
            _sync(file)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        if fresh:
            with contextlib.suppress(OSError):
                target.rmdir()
        raise
    staged.rename(target / WHOLE)
    _publish(target, names)


def recovered(path: str | os.PathLike) -> pathlib.Path:
    """The folder with the files of ``path``, an interrupted save included. Raises FileNotFoundError."""
    target = _real(path)
    if (target / WHOLE).is_dir():
        return target / WHOLE
    if target.is_dir():
        return target
    raise FileNotFoundError(f"{target}: no such folder")


def _publish(target: pathlib.Path, names: frozenset[str]) -> None:
    """Put the files of ``.whole`` into their places; it stays as it is until all are there."""
    whole, spare = target / WHOLE, target / NEW
    if whole.is_dir():
        spare.mkdir(exist_ok=True)
        files = {file.name: file for file in whole.iterdir()}
        for name, file in files.items():
            _same(file, spare / name)
            (spare / name).replace(target / name)
        for name in names - files.keys():
            (target / name).unlink(missing_ok=True)
        shutil.rmtree(spare)  # a rename onto the same file leaves it there
        shutil.rmtree(target / DONE, ignore_errors=True)
        whole.rename(target / DONE)
    shutil.rmtree(target / DONE, ignore_errors=True)


def _same(file: pathlib.Path, other: pathlib.Path) -> None:
    """``other`` is the same file, or a copy where the file system has no links."""
    other.unlink(missing_ok=True)
    try:
        os.link(file, other)
    except OSError:
        shutil.copy(file, other)
        _sync(other)


def _require_ours(target: pathlib.Path, names: frozenset[str]) -> None:
    if target.is_file():
        raise FileExistsError(f"{target} is a file; a model is saved as a folder")
    there = {f.name for f in target.iterdir()} if target.is_dir() else set()
    others = {name for name in there - names if not name.startswith(".") and name != "lost+found"}
    if others:
        came = ", ".join(sorted(others)[:3])
        raise FileExistsError(f"{target}: the rule is a new folder, or one with a saved model alone; it holds {came}")


def _real(path: str | os.PathLike) -> pathlib.Path:
    """A link stays one: what it points to is written to."""
    return pathlib.Path(os.path.realpath(path))


def _sync(file: pathlib.Path) -> None:
    with open(file, "rb") as f:
        os.fsync(f.fileno())
