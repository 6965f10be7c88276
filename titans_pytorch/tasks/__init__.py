"""Tasks by name: what is asked of a model, and what counts as right.  They know nothing of models and do not train."""

from __future__ import annotations

from titans_pytorch.tasks.mqar import MQAR
from titans_pytorch.tasks.task import NO_ANSWER, Questions, Task

TASKS: dict[str, type[Task]] = {"mqar": MQAR}


def register_task(name: str, kind: type[Task]) -> None:
    """Make a task known by name."""
    if name in TASKS:
        raise ValueError(f"a task's name must be new, got {name!r}, which is taken; taken are {sorted(TASKS)}")
    TASKS[name] = kind


__all__ = ["MQAR", "NO_ANSWER", "TASKS", "Questions", "Task", "register_task"]
