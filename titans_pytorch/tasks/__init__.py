"""Tasks by name: what is asked of a model, and what counts as right.  They know nothing of models and do not train.

task = make_task("niah_single_1", tokens=4096)
ids, answers = task.draw(8, torch.Generator().manual_seed(0))      # (8 4096) each
task.score(logits.argmax(-1), Questions(ids, answers))             # by task.metric
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial

from titans_pytorch.tasks.babilong import BABILong
from titans_pytorch.tasks.compression import Compression
from titans_pytorch.tasks.formal import AnBn, ModularCounting, Parity
from titans_pytorch.tasks.fuzzy_recall import FuzzyRecall
from titans_pytorch.tasks.hidden import HiddenInText
from titans_pytorch.tasks.in_context_recall import InContextRecall
from titans_pytorch.tasks.induction import InductionHeads
from titans_pytorch.tasks.memorization import Memorization
from titans_pytorch.tasks.mqar import MQAR
from titans_pytorch.tasks.needles import Needles
from titans_pytorch.tasks.passkey import Passkey
from titans_pytorch.tasks.selective_copying import SelectiveCopying
from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task
from titans_pytorch.tasks.text import TextTask
from titans_pytorch.tasks.variable_tracking import VariableTracking

TASKS: dict[str, Callable[..., Task]] = {
    "mqar": MQAR,
    "mqar_zoology": MQAR.zoology,
    "induction_heads": InductionHeads,
    "selective_copying": partial(SelectiveCopying, tokens=4096 + 17),
    "mad_in_context_recall": InContextRecall,
    "mad_noisy_recall": partial(InContextRecall, noise=0.2),
    "mad_fuzzy_recall": FuzzyRecall,
    "mad_compression": Compression,
    "mad_memorization": Memorization,
    "mad_selective_copying": SelectiveCopying,
    "niah_single_1": Needles,
    "niah_single_2": partial(Needles, haystack="text"),
    "niah_single_3": partial(Needles, haystack="text", value="uuids"),
    "niah_multikey_1": partial(Needles, haystack="text", num_keys=4),
    "niah_multikey_2": partial(Needles, haystack="needles"),
    "niah_multikey_3": partial(Needles, haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": partial(Needles, haystack="text", num_values=4),
    "niah_multiquery": partial(Needles, haystack="text", num_keys=4, num_queries=4),
    "variable_tracking": VariableTracking,
    "passkey": Passkey,
    **{f"babilong_qa{number}": partial(BABILong, task=number) for number in range(1, 6)},
    "parity": Parity,
    "modular_counting": ModularCounting,
    "anbn": AnBn,
    "text": TextTask,
}
"""How a task is made, by its name: all but `tokens` may be left out, and mostly that too"""


def register_task(name: str, kind: Callable[..., Task]) -> None:
    """Make a task known by name."""
    if name in TASKS:
        raise ValueError(f"a task's name must be new, got {name!r}, which is taken; taken are {sorted(TASKS)}")
    TASKS[name] = kind


def make_task(name: str, **options: object) -> Task:
    """A task by its name, with other sizes than usual."""
    if name not in TASKS:
        raise ValueError(f"a task must be one of {sorted(TASKS)}, got {name!r}")
    known = inspect.signature(TASKS[name]).parameters
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{name} has the options {', '.join(known)}, got {', '.join(unknown)}")
    return TASKS[name](**options)


def tasks_named(name: str) -> list[str]:
    """All tasks of a family (niah, babilong, mad), or the one of this name."""
    found = [each for each in TASKS if each == name or each.startswith(f"{name}_")]
    if not found:
        raise ValueError(f"a task must be one of {sorted(TASKS)}, or what several names begin with, got {name!r}")
    return [name] if name in found else found


__all__ = [
    "MQAR",
    "NO_ANSWER",
    "TASKS",
    "AnBn",
    "BABILong",
    "Compression",
    "FuzzyRecall",
    "HiddenInText",
    "InContextRecall",
    "InductionHeads",
    "Memorization",
    "ModularCounting",
    "Needles",
    "Parity",
    "Passkey",
    "Questions",
    "SelectiveCopying",
    "Task",
    "TextTask",
    "VariableTracking",
    "make_task",
    "register_task",
    "tasks_named",
]
