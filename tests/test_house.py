"""The house is in order: one word for one thing, docstrings that stand by themselves, known types, imports one way."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "titans_pytorch"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text()) for path in FILES}
PUBLIC = [name for name in TREES if "/" not in name]
FLOORS = [
    *("checks", "fast_weights", "memory", "attention", "layers", "decoding"),
    *("mac", "titans", "tasks", "hf", "training"),
]
"""Folders, from the ground up: none imports from one above it"""


SIGNATURES = {"neural_memory.py": {"__init__"}}
"""Functions that are long because a published signature is: they hand every argument on by name"""


def definitions(tree: ast.Module) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from (n for n in ast.walk(tree) if isinstance(n, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)))


def test_no_two_classes_have_one_name() -> None:
    names = Counter(
        node.name for tree in TREES.values() for node in definitions(tree) if isinstance(node, ast.ClassDef)
    )
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("file", TREES)
def test_first_lines_of_docstrings_make_sense_by_themselves(file: str) -> None:
    tree = TREES[file]
    nodes: list[ast.AST] = [tree, *definitions(tree)]
    first = [(ast.get_docstring(node) or "").split("\n")[0] for node in nodes]  # type: ignore[arg-type]
    assert [line for line in first if line.startswith(("Of ", "The same", "What of "))] == []


@pytest.mark.parametrize("file", TREES)
def test_files_and_functions_fit_on_few_screens(file: str) -> None:
    assert len((PACKAGE / file).read_text().splitlines()) <= 420
    long = {n.name for n in definitions(TREES[file]) if length_of_body(n) > 60}
    assert long <= SIGNATURES.get(file, set())


def length_of_body(node: ast.AST) -> int:
    """Lines of a function's statements, its signature and its docstring left out."""
    if isinstance(node, ast.ClassDef):
        return 0
    body = node.body[1:] if ast.get_docstring(node) else node.body  # type: ignore[attr-defined, arg-type]
    return 0 if not body else body[-1].end_lineno - body[0].lineno + 1


@pytest.mark.parametrize("file", PUBLIC)
def test_public_functions_say_what_they_return(file: str) -> None:
    """No `Any` alone, where a type is known."""
    found = [
        node.name
        for node in definitions(TREES[file])
        if not isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        if node.returns is not None and ast.unparse(node.returns) == "Any"
    ]
    assert found == []


def test_users_get_errors_not_assertions() -> None:
    asserts = [file for file, tree in TREES.items() if any(isinstance(n, ast.Assert) for n in ast.walk(tree))]
    assert asserts == []


@pytest.mark.parametrize("file", [file for file in TREES if file.split("/")[0] in FLOORS])
def test_imports_run_one_way(file: str) -> None:
    floor = FLOORS.index(file.split("/")[0])
    imported = {
        module.split(".")[1]
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.ImportFrom) and (module := node.module or "").startswith("titans_pytorch.")
    }
    above = [folder for folder in imported if folder in FLOORS and FLOORS.index(folder) > floor]
    assert above == []
