"""Tasks: a solver that does what is asked scores 1, a guess scores chance; lengths are exact, and seeds decide."""

from __future__ import annotations

import math
import random
import re
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Generator

from tests.support import solvers
from titans_pytorch.tasks import MQAR, TASKS, BABILong, Needles, Questions, Task, babi, make_task, tasks_named, words
from titans_pytorch.tasks.hidden import hide
from titans_pytorch.tasks.text import NEVER, NO_NAME, last_seen

NAMES = set(TASKS)  # before other tests register theirs
READING = {name: solvers.by_reading(solvers.needle_values) for name in tasks_named("niah")}
READING |= {name: solvers.by_reading(solvers.story_answer) for name in tasks_named("babilong")}
SOLVERS: dict[str, solvers.Solver] = {
    **dict.fromkeys(("mqar", "mqar_zoology"), solvers.recall_pairs),
    "induction_heads": solvers.after_the_first_special,
    **dict.fromkeys(("selective_copying", "mad_selective_copying"), solvers.say_again),
    **dict.fromkeys(("mad_in_context_recall", "mad_noisy_recall"), solvers.what_followed),
    "mad_fuzzy_recall": solvers.what_motif_followed,
    "mad_compression": solvers.copy,
    "mad_memorization": solvers.learned_map(make_task("mad_memorization")),
    **dict.fromkeys(("parity", "modular_counting"), solvers.counted),
    "anbn": solvers.is_anbn,
    **READING,
    "variable_tracking": solvers.by_reading(solvers.variables),
    "passkey": solvers.by_reading(solvers.pass_key),
}
HARDER: list[tuple[str, Task]] = [
    ("mqar", MQAR(pairs=3, keys=5, tokens=30, gap=2)),
    ("mqar", MQAR(pairs=5, keys=5, tokens=20, gap=0)),
    ("mqar", MQAR(pairs=512, keys=1024, tokens=2048, gap=64)),
    ("mqar", MQAR(pairs=32, keys=64, tokens=256, overwritten=20)),
    ("mqar", MQAR(pairs=32, keys=64, tokens=256, filler="random", power=0.01)),
    ("mqar", MQAR(pairs=40, keys=4, values=80, key_tokens=3, tokens=400, overwritten=10)),
    ("induction_heads", make_task("induction_heads", tokens=2**17)),
    ("mad_noisy_recall", make_task("mad_noisy_recall", noise=0.8, vocabulary=32, tokens=301)),
    ("mad_fuzzy_recall", make_task("mad_fuzzy_recall", tokens=500, vocabulary=32, pairs=20, motif=2)),
    ("modular_counting", make_task("modular_counting", modulus=7)),
    ("anbn", make_task("anbn", tokens=9)),
    ("variable_tracking", make_task("variable_tracking", chains=3, hops=2, haystack="text")),
    ("niah_single_2", Needles(tokens=2000, haystack="docs")),
    ("niah_single_2", Needles(tokens=2000, haystack=("noise", "text", "docs", "numbers", "needles"))),
    ("niah_single_1", Needles(tokens=120, haystack="text", brief=True, num_keys=3, num_values=1)),
    *[("babilong_qa1", BABILong(task=number, tokens=6000)) for number in range(1, 6)],
    ("babilong_qa1", BABILong(task=(1, 2, 3, 4, 5), tokens=6000)),
]
CASES = [*((name, make_task(name)) for name in SOLVERS), *HARDER]


def generator(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def guessed(task: Any, questions: Questions, seed: int) -> torch.Tensor:
    """At random, among what answers of this task consist of."""
    possible = task.draw(32, generator(2)).answers.unique()
    possible = possible[possible >= 0]
    return possible[torch.randint(len(possible), questions.ids.shape, generator=generator(seed))]


def test_every_task_has_a_solver() -> None:
    assert set(SOLVERS) == NAMES - {"text"}


@pytest.mark.parametrize("name, task", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_solver_scores_1_and_a_guess_scores_chance(name: str, task: Any) -> None:
    rows = 16 if task.tokens <= 4096 else 4
    questions = task.draw(rows, generator())
    assert questions.ids.shape == questions.answers.shape == (rows, task.tokens)
    assert questions.is_asked.any(dim=1).all()
    assert int(questions.ids.min()) >= 0
    assert max(int(questions.ids.max()), int(questions.answers.max())) < task.num_tokens
    found = solvers.solved(task, SOLVERS[name], questions.ids, questions.is_asked)
    assert task.score(found, questions) == 1.0
    assert task.accuracy(found, questions) == 1.0
    if name not in tasks_named("babilong"):  # whose labels are whole words
        marks = torch.cat([task.marks(guessed(task, questions, seed), questions) for seed in range(1, 5)]).double()
        spread = (task.chance * (1 - task.chance) / len(marks)) ** 0.5
        assert abs(marks.mean() - task.chance) <= 5 * spread + 1e-3


@pytest.mark.parametrize("name, task", CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_a_seed_decides_and_another_length_is_exact_too(name: str, task: Any) -> None:
    first, again, other = (task.draw(2, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.answers, again.answers)
    assert not torch.equal(first.ids, other.ids)
    longer = make_task(name, tokens=5002) if name == "mqar_zoology" else replace(task, tokens=2 * task.tokens + 2)
    assert longer.draw(1, generator()).ids.shape == (1, longer.tokens)


@pytest.mark.parametrize("number", range(1, 6))
def test_a_label_at_random_scores_chance_in_babilong(number: int) -> None:
    task = BABILong(task=number, tokens=6000, haystack="noise")
    questions = task.draw(300, generator())
    found = solvers.solved(task, solvers.random_label(babi.LABELS[number], 0), questions.ids, questions.is_asked)
    assert abs(task.score(found, questions) - task.chance) < 0.1


def test_several_tasks_of_babilong_take_turns_at_random() -> None:
    task = BABILong(task=(1, 4), tokens=2000)
    texts = [bytes(row.tolist()) for row in task.draw(64, generator()).ids]
    of_first = sum(b"Question: Where is " in text for text in texts)
    assert 20 < of_first < 44
    assert all(b"Question: Wh" in text for text in texts)
    assert task.chance == BABILong(task=1).chance == BABILong(task=4).chance
    assert BABILong(task=(1, 5)).chance == (1 / 6 + 1 / 7) / 2


def test_several_haystacks_take_turns_at_random() -> None:
    texts = [bytes(row.tolist()) for row in Needles(tokens=1000, haystack=("noise", "docs")).draw(64, generator()).ids]
    assert 20 < sum(b"The grass is green." in text for text in texts) < 44
    assert all(text.count(b"magic") == 4 for text in texts)


def test_all_bytes_of_an_answer_have_to_be_right() -> None:
    task = make_task("niah_multivalue", tokens=2000)
    questions = task.draw(4, generator())
    guesses = questions.answers.clone()
    place = int(questions.is_asked[1].nonzero()[3])
    guesses[1, place] += 1
    assert task.marks(guesses, questions).tolist() == [True] * 4 + [False] + [True] * 11
    assert task.score(guesses, questions) == 15 / 16


# ---- multi-query recall


def test_questions_come_after_the_gap() -> None:
    task = MQAR(pairs=4, keys=9, tokens=40, gap=10)
    assert not task.draw(16, generator(3)).is_asked[:, : 2 * 4 + 10].any()


def test_zoology_asks_soon_and_at_even_places() -> None:
    questions = MQAR.zoology(tokens=256, pairs=16).draw(200, generator())
    rows, places = questions.is_asked.nonzero(as_tuple=True)
    gaps = places - 32
    assert len(rows) == 200 * 16
    assert (gaps % 2 == 0).all()
    assert gaps.float().median() < 60  # of up to 222: half of them would lie beyond 111 if they were anywhere
    assert questions.ids.max() <= 8191
    assert int(questions.answers.max()) > 8000
    assert int(questions.answers[questions.is_asked].min()) >= 4096


def test_an_overwritten_value_is_not_due_any_more() -> None:
    task = MQAR(pairs=6, keys=9, values=30, tokens=60, overwritten=6)
    questions = task.draw(8, generator())
    values = questions.ids[:, 1:24:2]
    for row in range(8):
        assert set(questions.answers[row][questions.is_asked[row]].tolist()) == set(values[row, 6:].tolist())


# ---- texts


def test_a_needle_lies_where_it_is_asked_to() -> None:
    for depth in (0.0, 0.25, 0.5, 1.0):
        task = Needles(tokens=20_000, haystack="text", depth=depth)
        text = bytes(task.draw(1, generator()).ids[0].tolist())
        place = (text.index(b"One of the special") - 150) / (20_000 - 500)
        assert abs(place - depth) < 0.02


def test_lines_are_hidden_between_lines_in_their_order() -> None:
    hay = b"one\ntwo\nthree\nfour\n"
    assert hide(hay, [(0.0, "x"), (0.5, "y"), (0.5, "z"), (1.0, "e")]) == b"x\none\ntwo\ny\nz\nthree\nfour\ne\n"
    assert hide(b"", [(0.3, "x")]) == b"x\n"


def test_things_are_hidden_between_the_sentences_of_any_text(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("It was late. Nobody spoke. The lamp went out. " * 400)
    task = BABILong(task=1, tokens=3000, data=str(tmp_path / "prose.txt"))
    questions = task.draw(4, generator())
    found = solvers.solved(task, READING["babilong_qa1"], questions.ids, questions.is_asked)
    assert task.score(found, questions) == 1.0
    text = bytes(questions.ids[0].tolist()).decode()
    assert len(re.findall(r"late\.\n\w+ \w+ [\w ]+\.\nNobody|spoke\.\n(?!The)|out\.\n(?!It)", text)) >= 1


def test_uuids_are_uuids_and_keys_differ() -> None:
    import uuid

    drawn = random.Random(0)
    assert all(uuid.UUID(words.uuid(drawn)).version == 4 for _ in range(20))
    assert len(set(words.different(500, words.key, drawn))) == 500


def test_the_real_babi_is_read(tmp_path: Path) -> None:
    story = "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    story += "4 Mary went to the kitchen.\n5 Where is Mary? \tkitchen\t4\n1 John went to the office.\n"
    story += "2 Where is John? \toffice\t1\n"
    file = tmp_path / "tasks" / "en" / "qa1_single-supporting-fact_test.txt"
    file.parent.mkdir(parents=True)
    file.write_text(story)
    with tarfile.open(tmp_path / "babi.tar.xz", "w:xz") as archive:
        archive.add(file, "tasks/en/qa1_single-supporting-fact_test.txt")
    for source in (tmp_path / "tasks", tmp_path / "babi.tar.xz"):
        task = BABILong(task=1, tokens=500, babi=str(source), haystack="noise")
        questions = task.draw(20, generator())
        found = solvers.solved(task, READING["babilong_qa1"], questions.ids, questions.is_asked)
        assert task.score(found, questions) == 1.0
        assert [len(each.facts) for each in babi.stories(str(source), 1, "test")] == [2, 3, 1]


def test_pieces_of_text_stay_in_their_documents(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([number]) * (50 + number))
    task = make_task("text", tokens=40, data=str(tmp_path))
    questions = task.draw(100, generator())
    assert (questions.ids == questions.ids[:, :1]).all()
    assert (questions.answers == questions.ids[:, :1]).all()
    held_out = task.held_out().draw(100, generator()).ids.unique()
    assert not set(held_out.tolist()) & set(questions.ids.unique().tolist())
    shuffled = replace(task, shuffled=True, piece=8).draw(4, generator())  # type: ignore[type-var]
    assert shuffled.ids.shape == (4, 40)
    assert len(shuffled.ids[0].unique()) > 2
    with pytest.raises(ValueError, match="tokens must leave a document of train that is as long, got 500"):
        make_task("text", tokens=500, data=str(tmp_path)).draw(1, generator())


def test_identifiers_know_when_they_were_seen_the_last_time() -> None:
    text = b"def alpha(x1):\n  alpha(x1)"
    ids = torch.tensor([list(text)])
    found = last_seen(Questions(ids[:, :-1], ids[:, 1:]))[0].tolist()
    assert found[:3] == [NO_NAME] * 3  # "ef " after the first byte; def is a keyword
    assert found[3:8] == [NEVER] * 5
    second = text.rindex(b"alpha") - 1
    assert found[second : second + 5] == [13] * 5
    assert found[second + 6 : second + 8] == [13] * 2


# ---- what cannot be


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("mqar", dict(pairs=8, keys=64, tokens=39, gap=16), "a task needs pairs <= keys and tokens >= 40, got MQAR"),
        ("mqar", dict(overwritten=9), "overwritten must be between 0 and 8, got 9"),
        ("mqar", dict(filler="full"), "filler must be blank or random, got 'full'"),
        ("induction_heads", dict(tokens=3), "tokens must be at least 4, got 3"),
        ("mad_memorization", dict(tokens=5), "tokens must be an even number, at least 2, got 5"),
        ("niah_single_1", dict(num_queries=2), "num_queries must be between 1 and 1, got 2"),
        (
            "niah_single_1",
            dict(haystack="essays"),
            "several of noise, text, docs, numbers, needles, got 'essays'",
        ),
        ("niah_single_1", dict(haystack=["docs", "essays"]), r"one or several of .*, got \('docs', 'essays'\)"),
        ("niah_single_1", dict(haystack=[]), r"haystack must be one or several of .*, got \(\)"),
        (
            "passkey",
            dict(haystack="needles"),
            "several of noise, text, docs, numbers, got 'needles'",
        ),
        ("mqar", dict(gap=-1), "gap must be at least 0, got -1"),
        ("mqar", dict(pairs=-1), "pairs must be at least 1, got -1"),
        ("parity", dict(modulus=3), "modulus must be between 2 and 2, got 3"),
        ("variable_tracking", dict(chains=100_001), "chains must be between 1 and 1000, got 100001"),
        ("mad_noisy_recall", dict(tokens=3), "tokens must hold at least 2 pairs beside a share of 0.2 of noise, got 3"),
        ("babilong_qa1", dict(task=6), "task must be between 1 and 5, got 6"),
        ("babilong_qa1", dict(task=[1, 6]), "task must be between 1 and 5, got 6"),
        ("babilong_qa1", dict(task=[]), "task must name at least one of bAbI's tasks, got none"),
        ("babilong_qa1", dict(sentences=3), "babilong_qa1 has the options tokens, .*, got sentences"),
        ("niah", dict(), r"a task must be one of \['anbn', .*, got 'niah'"),
    ],
)
def test_a_task_that_cannot_be_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(name, **options)


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("niah_single_1", dict(tokens="1024"), "tokens must be a whole number, got '1024'"),
        ("niah_single_1", dict(tokens=1024.0), "tokens must be a whole number, got 1024.0"),
        ("niah_single_1", dict(haystack=None), "haystack must be a text or a list of texts, got None"),
        ("niah_single_1", dict(depth=math.nan), "depth must be a number or None, got nan"),
        ("niah_single_1", dict(brief="no"), "brief must be True or False, got 'no'"),
        ("babilong_qa1", dict(task=[1.5]), r"task must be a whole number or a list of whole numbers, got \[1.5\]"),
        ("text", dict(data=5), "data must be a text or None, got 5"),
    ],
)
def test_a_value_of_another_type_is_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make_task(name, **options)


def test_settings_that_are_the_same_are_equal() -> None:
    assert BABILong(task=[1, 2]) == BABILong(task=(1, 2))
    assert BABILong(task=np.int64(2)) == BABILong(task=2)
    assert len({Needles(haystack=["noise", "docs"]), Needles(haystack=("noise", "docs"))}) == 1


def test_a_text_without_lines_has_depths(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"abc def " * 5000)
    task = Needles(tokens=2000, haystack="text", data=str(tmp_path / "text"), depth=0.5)
    text = bytes(task.draw(1, generator()).ids[0].tolist())
    assert 700 < text.index(b"One of the special") < 1100
    (tmp_path / "other").write_bytes(b"ACGT" * 10000)
    text = bytes(replace(task, data=str(tmp_path / "other")).draw(1, generator()).ids[0].tolist())
    assert 700 < text.index(b"One of the special") < 1100


@pytest.mark.parametrize("name", TASKS)
def test_no_sequences_can_be_drawn(name: str) -> None:
    task = make_task(name)
    assert task.draw(0, generator()).ids.shape == (0, *task.draw(1, generator()).ids.shape[1:])


def test_a_text_too_short_for_its_question_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens must be at least \d+ for Passkey, got 100"):
        make_task("passkey", tokens=100).draw(1, generator())
