"""The documentation is a site: every page is in its navigation, every public name in its reference, and it builds."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAVIGATION = (ROOT / "mkdocs.yml").read_text()
REFERENCE = {
    name for page in ROOT.glob("docs/api/*.md") for name in re.findall(r"^::: ([\w.]+)", page.read_text(), re.MULTILINE)
}
PUBLIC = ["", "hf", "fast_weights.rules", "titans.mixers", "tasks", "cuda_graphs"]
"""Packages whose `__all__` is for users"""
DATA = {"__version__", "RULES", "MIXERS", "TASKS", "NO_ANSWER"}


def public_names(package: str) -> list[str]:
    """What `__all__` lists, read from the source, as packages may need others."""
    tree = ast.parse((ROOT / "titans_pytorch" / package.replace(".", "/") / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if name not in DATA]
    raise AssertionError(package)


@pytest.mark.parametrize("package", PUBLIC)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    prefix = ".".join(filter(None, ("titans_pytorch", package)))
    names = public_names(package)
    assert names
    missing = [name for name in names if not {f"{prefix}.{name}", f"titans_pytorch.{name}"} & REFERENCE]
    assert missing == []


def test_every_page_is_in_the_navigation() -> None:
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")}
    assert set(re.findall(r": ([\w/]+\.md)$", NAVIGATION, re.MULTILINE)) == pages


def test_the_changelog_has_no_links_to_pages() -> None:
    """It is a page here, too, where links from the root of the repository lead nowhere: it names pages instead."""
    assert re.findall(r"\]\((?!https?://)[^)]*\)", (ROOT / "CHANGELOG.md").read_text()) == []


def build(tool: str, into: Path) -> str:
    """What a tool says while it builds the site, which has to be nothing to complain about."""
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"the site needs {tool}, of the extra docs")
    config = into / "mkdocs.yml"
    shutil.copytree(ROOT / "docs", into / "docs")  # so that nothing is left in the repository
    config.write_text(NAVIGATION.replace("paths: [.]", f"paths: [{ROOT}]").replace("path: [.]", f"path: [{ROOT}]"))
    command = [sys.executable, "-m", tool, "build", "--strict", "--config-file", str(config)]
    done = subprocess.run(command, cwd=into, capture_output=True, text=True, timeout=280, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-3000:]
    return said


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["zensical", "mkdocs"])
def test_it_builds_without_a_complaint(tool: str, tmp_path: Path) -> None:
    said = build(tool, tmp_path)
    assert "griffe" not in said, said
    site = tmp_path / "site"
    memory = (site / "api/memory/index.html").read_text()
    assert 'id="titans_pytorch.NeuralMemory.ask"' in memory
    assert "dim_head" in memory
    for page in site.glob("**/*.html"):  # nothing is fetched from elsewhere
        assert not re.search(r"<(?:script|link)[^>]+(?:src|href)=\"https?://", page.read_text()), page
