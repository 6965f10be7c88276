"""Tasks of the library as files of lm-eval, which asks them of any model: a text, and the answer that has to follow.

Each task at each length is a YAML file that says how to ask, and a JSON Lines file of what is asked. lm-eval's `acc` is
then the share of answers that greedy decoding writes, and `perplexity` what the right ones cost.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from titans_pytorch.checks import value_checks
from titans_pytorch.tasks import NO_ANSWER, TASKS, HiddenInText, Task, make_task, tasks_named

ASKED = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: '{{{{text}}}}'
doc_to_target: '{{{{answer}}}}'
target_delimiter: ''
metric_list: [{{metric: acc}}, {{metric: perplexity}}]
"""


def write_tasks(
    folder: Path,
    names: Sequence[str],
    lengths: Sequence[int],
    rows: int = 100,
    seed: int = 0,
    data: str | None = None,
) -> list[str]:
    """Write tasks that hide something in a text, each at all lengths in bytes, the answer included.

    The same seed gives the same texts. Where a task has several answers, what stands between them has to be right, too.

    folder: lm-eval's `--include_path`; names: of `titans_pytorch.tasks`, or what several begin with, as niah
    data: the text to hide things in, a file or a folder; None: the source of Python's own library

    -> names for lm-eval: the task's, and its length
    """
    value_checks.check_whole(rows=rows)
    value_checks.check_counts(seed=seed)
    made = [
        (f"{name}_{tokens}", hidden_in_text(name, tokens, data))
        for given in names
        for name in tasks_named(given)
        for tokens in lengths
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, task in made:
        file = (folder / f"{name}.jsonl").resolve()
        file.write_text("".join(json.dumps(asked) + "\n" for asked in questions(task, rows, seed)))
        (folder / f"{name}.yaml").write_text(ASKED.format(name=name, file=json.dumps(str(file))))
    return [name for name, _ in made]


def hidden_in_text(name: str, tokens: int, data: str | None) -> Task:
    """A task whose tokens are bytes of a text with its questions at the end."""
    if not isinstance(make_task(name), HiddenInText):
        known = ", ".join(each for each in TASKS if isinstance(make_task(each), HiddenInText))
        raise ValueError(f"a task for lm-eval must be one that hides something in a text, {known}; got {name}")
    return make_task(name, tokens=tokens, data=data).held_out()


def questions(task: Task, rows: int, seed: int) -> Iterator[dict[str, str]]:
    """Texts up to where the answer begins, and the answer."""
    drawn = task.draw(rows, torch.Generator().manual_seed(seed))
    for ids, answers in zip(drawn.ids.tolist(), drawn.answers.tolist(), strict=True):
        asked = [place for place, answer in enumerate(answers) if answer != NO_ANSWER]
        text = bytes([*ids, max(answers[-1], 0)])  # an answer at the end is no id
        begin, end = asked[0] + 1, asked[-1] + 2
        yield {"text": decoded(text[:begin]), "answer": decoded(text[begin:end])}


def decoded(text: bytes) -> str:
    """As it is, but for bytes of characters that were cut in two: each becomes a question mark."""
    while True:
        try:
            return text.decode()
        except UnicodeDecodeError as error:
            text = text[: error.start] + b"?" * (error.end - error.start) + text[error.end :]
