"""Tasks as files for lm-eval: the texts and answers of the library's own tasks, byte by byte."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from titans_pytorch.tasks import make_task
from titans_pytorch.tasks.harness_files import decoded, write_tasks
from titans_pytorch.training.runs_command import main


def asked(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["niah_single_2", "niah_single_3", "babilong_qa1", "variable_tracking", "passkey"])
def test_a_text_and_its_answer_are_what_the_task_draws(name: str, tmp_path: Path) -> None:
    (made,) = write_tasks(tmp_path, [name], [1500], rows=3, seed=7)
    drawn = make_task(name, tokens=1500).draw(3, torch.Generator().manual_seed(7))
    for pair, ids, answers in zip(asked(tmp_path, made), drawn.ids, drawn.answers, strict=True):
        (places,) = (answers >= 0).nonzero(as_tuple=True)
        first, last = int(places[0]), int(places[-1])
        text = torch.cat((ids[:1], torch.where(answers >= 0, answers, ids.roll(-1)))).tolist()
        assert pair["text"] == decoded(bytes(text[: first + 1]))
        assert pair["answer"] == decoded(bytes(text[first + 1 : last + 2]))


def test_several_answers_are_one_with_what_stands_between_them(tmp_path: Path) -> None:
    (made,) = write_tasks(tmp_path, ["niah_multivalue"], [1500], rows=2)
    for pair in asked(tmp_path, made):
        values = pair["answer"].split(", ")
        assert len(values) == 4
        assert all(f" is: {value}." in pair["text"] for value in values)


def test_the_same_seed_gives_the_same_texts(tmp_path: Path) -> None:
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_tasks(tmp_path / folder, ["niah_single_1"], [400], rows=2, seed=seed)
    first, same, other = (asked(tmp_path / folder, "niah_single_1_400") for folder in "abc")
    assert first == same
    assert first != other


def test_bytes_of_characters_cut_in_two_become_question_marks() -> None:
    assert decoded("naïve".encode()[:3] + b" one") == "na? one"
    assert decoded("ïve".encode()[1:]) == "?ve"


def test_names_are_families_and_lengths_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", str(tmp_path), "--tasks", "babilong_qa1,passkey", "--lengths", "500,1k", "--rows", "1"]) == 0
    names = capsys.readouterr().out.split()
    assert names == ["babilong_qa1_500", "babilong_qa1_1024", "passkey_500", "passkey_1024"]
    assert all((tmp_path / f"{name}.yaml").exists() for name in names)


@pytest.mark.parametrize(
    "given, said",
    [
        (["--tasks", "mqar"], "must be one that hides something in a text, niah_single_1, .*got mqar"),
        (["--lengths", "1q"], "--lengths must be numbers like"),
        (["--rows", "0"], "rows must be positive, got 0"),
        (["--tasks", "niah_single_1", "--lengths", "20"], "tokens must be at least"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["tasks", str(tmp_path), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(said, line)
