"""`titans-pytorch eval`: a trained run is asked tasks at many lengths."""

from __future__ import annotations

import json
import re
from argparse import Namespace
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from titans_pytorch.tasks import Task, make_task, tasks_named
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.files import disk_errors
from titans_pytorch.training.options import Parser, built, named, separated, switch
from titans_pytorch.training.runs import Run
from titans_pytorch.training.text import ByteText

RESULTS = "eval.jsonl"
UNITS = {"": 1, "k": 2**10, "m": 2**20}


def add_eval(commands: Any) -> None:
    """The command and its options."""
    each: Parser = commands.add_parser("eval", help="ask it tasks at many lengths")
    each.add_argument("run", type=Path, help="folder of the run")
    each.add_argument(
        "--tasks", type=separated(str), default=("niah", "babilong"), metavar="NAME,...", help=ABOUT_TASKS
    )
    each.add_argument("--lengths", default="1k,4k,16k", metavar="N,...", help="tokens; 1k is 1,024 [1k,4k,16k]")
    each.add_argument("--rows", type=named(int), default=32, metavar="N", help="sequences of each task and length [32]")
    each.add_argument("--batch", type=named(int), default=8, metavar="N", help="sequences at once [8]")
    each.add_argument("--seed", type=named(int), default=0, metavar="N", help="decides what is asked [0]")
    each.add_argument("--writes", type=switch, default=True, metavar="on|off", help="off: memories store nothing [on]")
    each.add_argument("--data", help="text to hide things in, a file or folder; default: Python's own source")
    each.add_argument("--babi", help="archive or folder of bAbI; default: stories by our own simulator")
    each.add_argument("--checkpoint", choices=("best", "last"), default="best", help="[best]")
    each.add_argument("--device", default="auto", help="cpu, cuda, ... [auto]")
    each.add_argument("--threads", type=named(int), metavar="N", help="of torch; default: as torch has it")


ABOUT_TASKS = "names, or what several begin with [niah,babilong]"


def evaluate(parsed: Namespace, device: str) -> int:
    """Ask everything, show a table, and add a line for each task and length to the run's eval.jsonl."""
    import torch

    from titans_pytorch.memory.writes import writes_off
    from titans_pytorch.training.answers import scored

    for name in ("rows", "batch", "threads"):
        if getattr(parsed, name) is not None and getattr(parsed, name) < 1:
            raise SettingsError(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    if parsed.seed < 0:
        raise SettingsError(f"--seed must be at least 0, got {parsed.seed}")
    names, lengths = tasks_of(parsed.tasks), lengths_of(parsed.lengths)
    if parsed.threads is not None:
        torch.set_num_threads(parsed.threads)
    run = Run(parsed.run)
    model, checkpoint = run.model(parsed.checkpoint)
    model.to(device)
    asked = list(tasks(names, lengths, parsed, run, model.num_tokens))
    table: dict[str, list[str]] = {name: [] for name in names}
    metrics: dict[str, str] = {}
    with nullcontext() if parsed.writes else writes_off(model):
        for name, tokens, task in tqdm(asked, unit="task", disable=len(asked) == 1):
            score, count = built(partial(scored, model, task, rows=parsed.rows, batch=parsed.batch, seed=parsed.seed))
            record = dict(task=name, tokens=tokens, metric=task.metric, score=score, answers=count, chance=task.chance)
            record |= dict(step=checkpoint.progress.step, writes="on" if parsed.writes else "off")
            record |= dict(rows=parsed.rows, seed=parsed.seed, data=name_of(parsed.data), babi=name_of(parsed.babi))
            keep(run, record)
            table[name].append(f"{score:.3f}")
            metrics[name] = task.metric
    print(heading(parsed, checkpoint.progress.step))
    show(lengths, table, metrics)
    return 0


def tasks_of(given: tuple[str, ...]) -> list[str]:
    return [each for name in given for each in built(partial(tasks_named, name))]


def lengths_of(given: str) -> list[int]:
    """1k,4k -> [1024, 4096]"""
    found = []
    for each in given.split(","):
        match = re.fullmatch(r"(\d+)([km]?)", each.strip().lower())
        if match is None or int(match[1]) < 1:
            raise SettingsError(f"--lengths must be numbers like 500, 4k or 1m, got {each!r}")
        found.append(int(match[1]) * UNITS[match[2]])
    return found


def tasks(
    names: list[str], lengths: list[int], parsed: Namespace, run: Run, num_tokens: int
) -> Iterator[tuple[str, int, Task]]:
    """Every task at every length; refuses those whose ids mean something else to the model."""
    for name in names:
        for tokens in lengths:
            task = built(partial(make_task, name, tokens=tokens, **texts(name, parsed)))
            if task.reads_last:
                raise SettingsError(
                    f"--tasks must answer at their tokens, got {name}, which needs a decoder of its own"
                )
            if task.num_tokens == ByteText.num_tokens and not isinstance(run.text_kind(), ByteText):
                raise SettingsError(f"--tasks must be of the model's tokens, got {name}, which is in bytes")
            if task.num_tokens > num_tokens:
                raise SettingsError(f"--tasks must have at most the model's {num_tokens} tokens, got {task.num_tokens}")
            yield name, tokens, task.held_out()


def texts(name: str, parsed: Namespace) -> dict[str, str]:
    """The options of a task that name a text, as far as it has them."""
    is_story = name.startswith("babilong")
    has_text = is_story or name.startswith("niah") or name in ("text", "variable_tracking", "passkey")
    found = {"data": parsed.data} if has_text and parsed.data else {}
    return found | ({"babi": parsed.babi} if is_story and parsed.babi else {})


def name_of(path: str | None) -> str | None:
    return None if path is None else Path(path).name


def keep(run: Run, record: dict[str, Any]) -> None:
    path = run.folder / RESULTS
    with disk_errors(path), path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def heading(parsed: Namespace, step: int) -> str:
    """What was asked of what."""
    writes = "on" if parsed.writes else "off"
    return f"checkpoint {parsed.checkpoint} (step {step}), writes {writes}, {parsed.rows} sequence(s) of each"


def show(lengths: list[int], table: dict[str, list[str]], metrics: dict[str, str]) -> None:
    """A line for each task, a column for each length, and what its numbers are."""
    width = max(map(len, table))
    print(" ".join([" " * width, *(f"{length:>9,}" for length in lengths)]))
    for name, cells in table.items():
        print(" ".join([f"{name:<{width}}", *(f"{cell:>9}" for cell in cells), f"  {metrics[name]}"]))
