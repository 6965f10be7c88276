"""docs/map.md is true: every file of the package and of the benchmarks has its phrase, and the walk is a short one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "titans_pytorch"
MAP = (ROOT / "docs" / "map.md").read_text()


def named() -> set[str]:
    """Files that the tables name, by their path in the package; a bare name goes on in the folder before it."""
    found, folder = set(), ""
    for line in MAP.splitlines():
        if heading := re.match(r"### `(?:titans_pytorch/)?([\w/]*)`", line):
            folder = heading.group(1)
        if not line.startswith("| `"):
            continue
        inner = ""
        for name in re.findall(r"`([\w/]+\.py)`", line.split("|")[1]):
            inner = name.rpartition("/")[0] if "/" in name else inner
            is_whole = (PACKAGE / name).exists() and "/" in name
            found.add(name if is_whole else "/".join(filter(None, (folder.strip("/"), inner, name.rpartition("/")[2]))))
    return found


def test_every_file_has_its_phrase() -> None:
    files = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    files |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").rglob("*.py")}
    files = {file for file in files if not file.endswith("__init__.py")}
    assert named() - files == set(), "named on the map, but not there"
    assert files - named() == set(), "there, but not on the map"


def test_storing_and_reading_a_chunk_is_ten_files_and_1500_lines() -> None:
    walk = re.findall(r"^\| \d+ \| `([\w/]+\.py)`", MAP, flags=re.MULTILINE)
    assert len(walk) == 10
    assert sum(len((PACKAGE / file).read_text().splitlines()) for file in walk) <= 1500


def test_equations_10_13_and_14_stand_in_the_rule_each_on_one_line() -> None:
    lines = (PACKAGE / "fast_weights" / "rules" / "titans.py").read_text().splitlines()
    assert any("eta * momentum + " in line and line.rstrip().endswith("# eqs. 10, 14") for line in lines)
    assert any("gates.keep * weights + step" in line and "# eq. 13" in line for line in lines)


def test_the_root_lists_what_users_import() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 16
