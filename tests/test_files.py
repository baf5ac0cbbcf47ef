"""Saved models on disk: whole whatever interrupts a save, where the folder cannot be renamed, with the umask's modes."""

import errno
import os
import pathlib
import shutil
import stat

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.layers import _folder

STEPS = ("link", "mkdir", "rename", "replace", "rmdir", "unlink")
"""What a save asks of the file system, beside writing its files."""


def model(value: int) -> gl.Sequential:
    """Each of another shape, so that a mixture of two is no model."""
    model = gl.Sequential(gl.Linear(2, value, bias=False))
    model[0].weight.data[...] = value
    return model


def value(path: pathlib.Path) -> float:
    return float(gl.load(path)[0].weight.data[0, 0])


class Killed(BaseException):
    """The process ends here: nothing after it has an effect."""


def saved_until(patch: pytest.MonkeyPatch, path: pathlib.Path, steps: int) -> bool:
    """Save model(2) in a process that is killed after so many steps; whether it came to its end."""
    count = 0

    def killing(real):
        def call(*args, **options):
            nonlocal count
            count += 1
            if count > steps:
                raise Killed
            return real(*args, **options)

        return call

    for name in STEPS:
        patch.setattr(os, name, killing(getattr(os, name)))
    try:
        gl.save(model(2), path)
    except Killed:
        return False
    return True


def test_a_save_killed_at_any_step_leaves_the_old_model_or_the_new(tmp_path, monkeypatch):
    """… and the next save is whole. A checkpoint's files, which the new model lacks, go with the old one."""
    path, seen, finished = tmp_path / "model", [], False
    while not finished:
        shutil.rmtree(path, ignore_errors=True)
        gl.save(model(1), path)
        (path / "training.json").write_text("{}")
        with monkeypatch.context() as patch:
            finished = saved_until(patch, path, len(seen))
        seen.append(value(path))
        assert _folder.recovered(path).joinpath("training.json").exists() or seen[-1] == 2
        gl.save(model(3), path)
        assert value(path) == 3 and sorted(os.listdir(path)) == ["config.json", "weights.safetensors"]
    assert seen == sorted(seen) and set(seen) == {1, 2} and len(seen) > 8


def test_a_folder_that_cannot_be_renamed_is_saved_into(tmp_path, monkeypatch):
    """A mount point: it stays where it is, and nothing can be moved across its border."""
    path = tmp_path / "mount"
    path.mkdir()
    (path / "lost+found").mkdir()

    def guarded(real):
        def call(source, target, **options):
            inside = [pathlib.Path(p).is_relative_to(path) and pathlib.Path(p) != path for p in (source, target)]
            if not all(inside):
                code = errno.EBUSY if path in (source, target) else errno.EXDEV
                raise OSError(code, os.strerror(code), str(source))
            return real(source, target, **options)

        return call

    for name in ("rename", "replace", "link"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    for n in (1, 2):
        gl.save(model(n), path)
        assert value(path) == n and sorted(os.listdir(path)) == ["config.json", "lost+found", "weights.safetensors"]
    assert os.listdir(tmp_path) == ["mount"]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def link(*_, **__):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    for n in (1, 2):
        gl.save(model(n), tmp_path / "model")
        assert value(tmp_path / "model") == n
    assert sorted(os.listdir(tmp_path / "model")) == ["config.json", "weights.safetensors"]


def test_a_first_save_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_folder, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        gl.save(model(1), tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("umask, file, folder", [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o002, 0o664, 0o775)])
def test_the_umask_says_who_may_read(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        gl.save(model(1), tmp_path / "model")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "model").iterdir()}
    assert modes == {"config.json": file, "weights.safetensors": file}
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) == folder
    assert np.array_equal(gl.load(tmp_path / "model")[0].weight.data, model(1)[0].weight.data)
