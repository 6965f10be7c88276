"""`titans-pytorch eval` asks a trained run tasks, and writes down what it answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training_runs import error, text, train
from titans_pytorch.tasks import NO_ANSWER, make_task
from titans_pytorch.titans import TitansConfig, TitansMAG
from titans_pytorch.training import answers, runs_command
from titans_pytorch.training.eval_command import lengths_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    assert train(folder / "run", text(folder / "words.txt"), "--steps", "2") == 0
    return folder / "run"


def evaluated(run: Path, *options: str) -> list[dict[str, Any]]:
    (run / "eval.jsonl").unlink(missing_ok=True)
    assert runs_command.main(["eval", str(run), "--device", "cpu", *options]) == 0
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def test_every_task_at_every_length(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluated(run, "--tasks", "passkey,babilong_qa1,text", "--lengths", "400,1k", "--rows", "3", "--batch", "2")
    assert [(each["task"], each["tokens"]) for each in found] == [
        (name, tokens) for name in ("passkey", "babilong_qa1", "text") for tokens in (400, 1024)
    ]
    assert [each["answers"] for each in found] == [3, 3, 3, 3, 1200, 3072]
    assert all(5 < each["score"] < 9 for each in found[4:])  # bits per byte of a model that has learned nothing
    assert {each["step"] for each in found} == {2}
    lines = capsys.readouterr().out.splitlines()[-4:]
    assert lines[0].split() == ["400", "1,024"]
    assert [line.split()[0] for line in lines[1:]] == ["passkey", "babilong_qa1", "text"]
    assert [line.split(maxsplit=3)[3] for line in lines[1:]] == ["exact match", "exact match", "bits per byte"]


def test_a_heading_says_what_was_asked_of_what(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(run, "--tasks", "passkey", "--lengths", "400", "--rows", "3", "--writes", "off")
    heading, *_ = capsys.readouterr().out.splitlines()[-3:]
    assert heading == "checkpoint best (step 2), writes off, 3 sequence(s) of each"


def test_writes_can_be_off(run: Path) -> None:
    on, off = (evaluated(run, "--tasks", "text", "--lengths", "300", "--writes", how)[0] for how in ("on", "off"))
    assert (on["writes"], off["writes"]) == ("on", "off")
    assert on["score"] != off["score"]


def test_lengths_are_read_as_people_write_them() -> None:
    assert lengths_of("500,1k,2m") == [500, 1024, 2 * 2**20]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tasks", "chess"], "a task must be one of"),
        (["--tasks", "mqar_zoology"], "--tasks must have at most the model's 256 tokens, got 8192"),
        (["--tasks", "mad_compression", "--lengths", "32"], "--tasks must answer at their tokens, got mad_compression"),
        (["--lengths", "4x"], "--lengths must be numbers like 500, 4k or 1m, got '4x'"),
        (["--tasks", "passkey", "--lengths", "50"], "tokens must be at least"),
        (["--rows", "0"], "--rows must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_sentence(
    options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runs_command.main(["eval", str(run), *options]) == 2
    assert message in error(capsys)


# ---- what is answered


def test_answers_are_those_of_the_whole_sequence_and_the_batch_decides_nothing() -> None:
    torch.manual_seed(0)
    task = make_task("mqar", tokens=96)
    model = TitansMAG(task.num_tokens, TitansConfig(dim=16, depth=2, heads=2, window=8)).double()
    questions = task.draw(4, torch.Generator().manual_seed(0))
    logits, _ = model(questions.ids)
    whole, pieces = answers.answers_of(model, questions), answers.answers_of(model, questions, piece=13)
    is_asked = questions.is_asked
    assert torch.equal(whole.guesses[is_asked], logits.argmax(dim=-1)[is_asked])
    assert (whole.guesses[~is_asked] == NO_ANSWER).all()
    torch.testing.assert_close(whole.losses[is_asked].mean(), answers.loss_of(model, questions).detach().float())
    for one, other in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, other)
    scores = [answers.scored(model, task, rows=6, batch=batch, seed=1) for batch in (1, 4, 6)]
    assert scores[0] == scores[1] == scores[2]
    assert scores[0].num_answers == 6 * 8
