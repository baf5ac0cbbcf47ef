"""What the documentation shows runs: its Python, its commands; and every gallery layer has its place and its picture.

Blocks with a title are files, which the blocks after them import; a page's other Python blocks run one after another.
"""

import importlib.util
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import gallery
import pytest

from gpulayers import cli
from gpulayers.layers import _config

ROOT = pathlib.Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)
QUICK = ("new", "check", "explain", "info")
"""Commands that are run as they stand; of others the arguments are parsed."""


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A folder, whose modules and registered layers go with the test."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(_config, "_registry", dict(_config._registry))
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        path = getattr(sys.modules[name], "__file__", None) or ""
        if path.startswith(str(tmp_path)):
            del sys.modules[name]


def needs(text: str) -> None:
    for package in ("torch", "triton", "sklearn", "matplotlib"):
        if re.search(rf"^import {package}\b|^from {package}\b", text, re.M):
            pytest.importorskip(package)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_a_page_runs(page, elsewhere, capsys):
    names: dict = {"__name__": page.stem}
    text = page.read_text(encoding="utf-8")
    needs(text)
    for language, title, body in BLOCK.findall(text):
        if title:
            (elsewhere / title).write_text(body, encoding="utf-8")
        elif language == "python" and "--8<--" not in body:
            exec(compile(body, f"{page.name}: {body.splitlines()[0]}", "exec"), names)
        elif language == "bash":
            for line in body.splitlines():
                run(line)


def test_the_mistake_that_the_tutorial_shows(elsewhere, capsys):
    """Its message is the one that a reader gets."""
    text = (DOCS / "tutorial.md").read_text(encoding="utf-8")
    right = next(body for _, title, body in BLOCK.findall(text) if title == "ripple.py")
    shown = next(body for _, _, body in BLOCK.findall(text) if body.startswith("gpulayers: Ripple:"))
    (elsewhere / "ripple.py").write_text(right.replace("(dy * np.sin(x)).sum(0)", "dy * np.sin(x)"), encoding="utf-8")
    assert cli.main(["check", "ripple.py:Ripple"]) == 1
    assert " ".join(capsys.readouterr().err.split()) == " ".join(shown.split())


def run(line: str) -> None:
    words = shlex.split(line, comments=True)
    if not words or words[0] != "gpulayers":
        return
    if words[1] in QUICK:
        assert cli.main(words[1:]) == 0, line
    else:
        cli._parser().parse_args(words[1:])


def test_commands_in_the_text_exist():
    for page in (*PAGES, ROOT / "README.md"):
        for line in re.findall(r"`(gpulayers [a-z][^`\n]*)`", page.read_text(encoding="utf-8")):
            words = shlex.split(line)
            if "…" not in line and len(words) > 2:
                cli._parser().parse_args(words[1:])
            else:
                assert words[1] in cli._parser().format_help(), line


def test_links_lead_somewhere():
    for page in PAGES:
        text = BLOCK.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (DOCS / target).is_file(), f"{page.name}: {target}"
    for target in re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert (ROOT / target).is_file(), f"README.md: {target}"


def test_every_page_is_in_the_menu():
    listed = re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == [page.name for page in PAGES]


def test_what_the_api_lists_exists():
    names = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.M)
    assert len(names) > 25
    for name in names:
        module, _, attribute = name.rpartition(".")
        if module.startswith("gpulayers.torch") or "bench" in module:
            pytest.importorskip("torch")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_the_gallery_has_every_layer():
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for entry in gallery.ENTRIES:
        assert f'--8<-- "examples/custom_layers/{entry.module}.py"' in text
        assert f"images/{entry.module}.svg" in text and (DOCS / f"images/{entry.module}.svg").is_file()


def test_the_pictures_can_be_drawn(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("plots", DOCS / "plots.py")
    plots = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plots)
    with gallery.importable():
        plots.draw("swish", tmp_path, epochs=1)
        assert sorted(plots.PANELS) == [entry.module for entry in gallery.ENTRIES]
    assert "<svg" in (tmp_path / "swish.svg").read_text()


def test_the_site_builds(tmp_path):
    """Without a warning: links, snippets, and the API's names."""
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["docs"]
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("mkdocstrings") is None:
        pytest.skip(f"needs pip install {' '.join(extra)}")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check_layer" in (tmp_path / "site/api/index.html").read_text(encoding="utf-8")
