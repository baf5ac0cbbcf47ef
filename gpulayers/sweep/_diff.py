"""The audit of another commit: checked out beside this one, and asked by the same command."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import gpulayers
from gpulayers.sweep._results import Sweep, read


def audited(revision: str, arguments: Sequence[str], root: Path | None = None) -> Sweep:
    """What ``gpulayers audit`` finds in another commit of the checkout at ``root`` (by default this one's).

    ValueError without a checkout, for a revision that git doesn't know, and for one that has no ``gpulayers audit``;
    RuntimeError if it fails there.
    """
    root = root or Path(gpulayers.__file__).parents[1]
    with _checked_out(root, revision) as tree, tempfile.TemporaryDirectory() as folder:
        if not (tree / "gpulayers" / "sweep").is_dir():
            raise ValueError(
                f"audit: --diff: {revision} has no `gpulayers audit` yet, so there is nothing to compare with"
            )
        results = Path(folder) / "results.json"
        command = [sys.executable, "-m", "gpulayers.cli", "audit", *arguments, "--json", str(results)]
        environment = os.environ | {"PYTHONPATH": str(tree)}
        done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        if not results.is_file():
            raise RuntimeError(f"audit: --diff: the audit of {revision} ended with status {done.returncode}")
        return read(results)


@contextlib.contextmanager
def _checked_out(root: Path, revision: str) -> Iterator[Path]:
    """A temporary worktree of a revision."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        added = _git(root, "worktree", "add", "--detach", str(tree), revision)
        if added.returncode:
            raise ValueError(f"audit: --diff: git gives no {revision!r}: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            _git(root, "worktree", "remove", "--force", str(tree))


def _git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
