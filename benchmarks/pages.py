"""Parts of hand-written pages that are written by scripts, each between two comments with its name."""

from __future__ import annotations

import argparse
from pathlib import Path


def without_options(about: str | None) -> None:
    """A command that rewrites a page says with --help what it does, and refuses what it does not know."""
    argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def put(page: Path, name: str, text: str) -> None:
    """Set what stands between `<!-- name -->` and `<!-- end of name -->`; a page without them gets them at its end."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before = page.read_text() if page.exists() else ""
    if begin not in before:
        before = f"{before.rstrip()}\n\n{begin}\n{end}\n".lstrip()
    head, rest = before.split(begin, 1)
    page.write_text(f"{head}{begin}\n{text.strip()}\n{end}{rest.split(end, 1)[1]}")


def markdown(table: list[list[str]]) -> str:
    """A table whose first row is its header."""
    header, *rows = table
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
