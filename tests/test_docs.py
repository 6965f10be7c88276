"""The pages are true: what they name is there, links lead somewhere, and their Python runs.

A block of a page goes on with the names of the blocks before it. A comment `# warns: words` says that it warns so.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest.mock import patch

import pytest

from titans_pytorch import NeuralMemory, TitansConfig
from titans_pytorch.fast_weights.rules import RULES
from titans_pytorch.losses import LOSSES
from titans_pytorch.memory.costs import COSTS
from titans_pytorch.public_names import NAMED
from titans_pytorch.titans.mixers import MIXERS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "titans_pytorch"
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("data/*.md"))
}
FENCE = re.compile(r"^ *```(.*?)\n(.*?)^ *```$", flags=re.MULTILINE | re.DOTALL)
OF_EXTRAS = {"titans_pytorch.hf": "transformers", "from peft": "peft"}
"""Parts that a page may import, and the packages they need, which a machine may lack; CI has them"""
OPTIONS = {*inspect.signature(NeuralMemory.__init__).parameters, *TitansConfig.__dataclass_fields__}


class Fenced(NamedTuple):
    """What stands between two fences of a page."""

    language: str
    text: str
    line: int  # of the page, from 0, where the text begins


def blocks(page: str, *languages: str) -> list[Fenced]:
    """The fenced blocks of a page in these languages; of all, if none is named."""
    text = PAGES[page]
    found = [
        Fenced(hit.group(1).strip(), hit.group(2), text[: hit.start(2)].count("\n")) for hit in FENCE.finditer(text)
    ]
    return [block for block in found if not languages or block.language in languages]


def prose(page: str) -> str:
    """A page without its blocks."""
    return FENCE.sub("", PAGES[page])


# ---- Python of the pages


@pytest.fixture
def _own_registries() -> Iterator[None]:
    """What a page registers is known on that page only, and so is what it changes in the table of costs."""
    with patch.dict(RULES), patch.dict(LOSSES), patch.dict(MIXERS), patch.dict(NAMED), patch.dict(COSTS):
        yield


@pytest.mark.usefixtures("_own_registries")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, package in OF_EXTRAS.items():
        if any(part in block.text for block in blocks(page, "python")):
            pytest.importorskip(package, reason=f"{part} needs {package}")
    monkeypatch.chdir(tmp_path)
    module = ModuleType(f"page_{re.sub(r'[^a-z]', '_', page.lower())}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page, "python"):
        run(module, page, block)


def run(module: ModuleType, page: str, block: Fenced) -> None:
    """Run a block in a module; lines of a traceback are those of the page."""
    code = compile("\n" * block.line + block.text, str(ROOT / page), "exec")
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        for category in (
            DeprecationWarning,
            FutureWarning,
        ):  # as in pyproject.toml: what others warn about among themselves
            warnings.filterwarnings("default", category=category, module="(?!page|titans_pytorch)")
        for words in re.findall(r"# warns: (.+)$", block.text, flags=re.MULTILINE):
            stack.enter_context(pytest.warns(match=re.escape(words)))
        exec(code, module.__dict__)


def test_a_block_that_fails_is_noticed() -> None:
    with pytest.raises(AssertionError):
        run(ModuleType("page"), "README.md", Fenced("python", "assert 1 == 2\n", 0))
    with pytest.raises(UserWarning, match="unannounced"):
        run(ModuleType("page"), "README.md", Fenced("python", "import warnings\nwarnings.warn('unannounced')\n", 0))
    with pytest.raises(pytest.fail.Exception):
        run(ModuleType("page"), "README.md", Fenced("python", "x = 1  # warns: something\n", 0))


@pytest.mark.parametrize("page", PAGES)
def test_blocks_say_their_language(page: str) -> None:
    """So that nothing is Python, and yet not run."""
    for block in blocks(page):
        assert block.language in ("", "text", "python", "bash", "sh", "json"), f"{page}:{block.line}"
        if block.language == "":
            assert not re.search(r"^(import|from|def|class|with) ", block.text, flags=re.MULTILINE), block.text


@pytest.mark.parametrize("script", sorted(ROOT.glob("docs/draw_*.py")), ids=lambda path: path.stem)
def test_what_draws_the_pictures_finds_what_it_draws(script: Path) -> None:
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


# ---- what the pages name


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for block in blocks(page, "bash", "sh"):
            for line in block.text.splitlines():
                yield page, line


def test_commands_start_what_is_there() -> None:
    for page, line in commands():
        for script in re.findall(r"\b([\w/]+\.py)\b", line):
            assert (ROOT / script).is_file(), f"{page}: {line}"
        for module in re.findall(r"python -m (benchmarks[\w.]*)", line):
            assert importlib.util.find_spec(module) is not None, f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_modules_that_a_page_says_to_run_are_there(page: str) -> None:
    for module in re.findall(r"`python -m (benchmarks[\w.]*)", PAGES[page]):
        assert importlib.util.find_spec(module) is not None, module


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        file, _, heading = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), target
        assert not heading or heading in headings(path.read_text()), target


def headings(text: str) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.+)$", FENCE.sub("", text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES)
def test_python_files_that_a_page_names_are_there(page: str) -> None:
    ours = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")]
    for name in re.findall(r"`(?:python )?([\w/]+\.py)\b", prose(page)):
        assert any(f"/{path}".endswith(f"/{name}") for path in ours), name


# ---- where the paper is in the code


def cells(page: str, column: str) -> Iterator[str]:
    """The cells of a column, in all tables of a page that have it."""
    index: int | None = None
    for line in prose(page).splitlines():
        row = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if not row:
            index = None
        elif index is None:
            index = row.index(column) if column in row else -1
        elif index >= 0 and set(row[index]) != {"-"}:
            yield row[index]


def names(cell: str) -> Iterator[tuple[str | None, str]]:
    """What a cell names in the package: the last file before the name, and the name, perhaps of a method."""
    file = None
    for quoted in re.findall(r"`([^`]+)`", cell):
        if quoted.endswith(".py"):
            file = quoted
        elif quoted.partition("=")[0] not in OPTIONS:
            yield file, quoted


def is_defined(file: str | None, name: str) -> bool:
    """Whether a file of the package defines a class, function or constant, and it has that method."""
    if file is None or not (PACKAGE / file).is_file():
        return False
    module = importlib.import_module(f"titans_pytorch.{file.removesuffix('.py').replace('/', '.')}")
    owner, _, method = name.partition(".")
    found = module.__dict__.get(owner)
    if found is None or getattr(found, "__module__", module.__name__) != module.__name__:
        return False
    return not method or hasattr(found, method)


PLACES = [name for cell in cells("docs/paper.md", "where") for name in names(cell)]


def test_the_page_of_the_paper_names_places() -> None:
    assert len(PLACES) > 50
    assert ("fast_weights/rules/titans.py", "Titans.retain") in PLACES


@pytest.mark.parametrize("file, name", sorted({(file or "", name) for file, name in PLACES}))
def test_the_paper_is_where_the_page_says(file: str, name: str) -> None:
    assert is_defined(file, name), f"`{file}` `{name}`"


@pytest.mark.parametrize(
    "file, name",
    [
        (None, "Titans.retain"),
        ("fast_weights/nowhere.py", "Titans"),
        ("fast_weights/rules/titans.py", "Titans.forget"),
        ("fast_weights/rules/titans.py", "Rule"),  # imported there, defined elsewhere
    ],
)
def test_a_place_that_is_not_there_is_noticed(file: str | None, name: str) -> None:
    assert not is_defined(file, name)


@pytest.mark.parametrize("column", ["option", "config"])
def test_options_that_the_page_of_the_paper_names_exist(column: str) -> None:
    named = [quoted for cell in cells("docs/paper.md", column) for quoted in re.findall(r"`([^`]+)`", cell)]
    assert len(named) > 5
    assert [quoted for quoted in named if quoted.partition("=")[0] not in OPTIONS] == []


def test_the_readme_says_which_mac_is_which() -> None:
    start = PAGES["README.md"][:2500]
    assert "`MemoryAsContextTransformer`" in start
    assert "`TitansMAC`" in start
    assert "not** the MAC of the\npaper" in start
