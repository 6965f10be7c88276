"""What is released calls itself by one version everywhere, and asks for extras that there are."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text, flags=re.MULTILINE)
    assert match is not None, pattern
    return match.group(1)


def test_one_version() -> None:
    version = found(r'^version = "(.+)"', PROJECT)
    assert found(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text()) == version
    assert found(r'__version__ = "(.+)"', (ROOT / "titans_pytorch" / "__init__.py").read_text()) == version
    assert found(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text()) == version


def test_extras_that_are_named_are_there() -> None:
    """Wherever somebody is told to pip install one."""
    extras = set(
        re.findall(r"^(\w+) = \[", PROJECT.partition("[project.optional-dependencies]")[2], flags=re.MULTILINE)
    )
    files = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("*.py"), *ROOT.glob(".ci/*")) if path.is_file()]
    files += [path for folder in ("titans_pytorch", "examples", "docs") for path in (ROOT / folder).rglob("*.[pm][yd]")]
    told = re.compile(r"pip install .*?['\"](?:titans-pytorch|\.)\[([\w,]+)\]")
    named = {extra for path in files for group in told.findall(path.read_text()) for extra in group.split(",")}
    named |= {
        extra
        for group in re.findall(r"-e '\.\[([\w,]+)\]'", (ROOT / ".ci" / "run").read_text())
        for extra in group.split(",")
    }
    assert {"test", "hf", "eval", "docs", "examples"} <= named
    assert named - extras == set()


def test_ci_checks_what_would_be_released() -> None:
    assert "bash .ci/release" in (ROOT / ".ci" / "run").read_text()
