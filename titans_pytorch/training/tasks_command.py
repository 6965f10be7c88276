"""`titans-pytorch tasks`: tasks of the library as files, for lm-eval to ask them of any model."""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

from titans_pytorch.tasks.harness_files import write_tasks
from titans_pytorch.training.eval_command import ABOUT_TASKS, lengths_of
from titans_pytorch.training.files import disk_errors
from titans_pytorch.training.options import Parser, built, named, separated


def add_tasks(commands: Any) -> None:
    """The command and its options."""
    each: Parser = commands.add_parser("tasks", help="write tasks as files of lm-eval")
    each.add_argument("folder", type=Path, help="where to, lm-eval's --include_path")
    each.add_argument(
        "--tasks", type=separated(str), default=("niah", "babilong"), metavar="NAME,...", help=ABOUT_TASKS
    )
    each.add_argument("--lengths", default="1k", metavar="N,...", help="bytes, answers included; 1k is 1,024 [1k]")
    each.add_argument("--rows", type=named(int), default=100, metavar="N", help="questions of each [100]")
    each.add_argument("--seed", type=named(int), default=0, metavar="N", help="decides what is asked [0]")
    each.add_argument("--data", help="text to hide things in, a file or folder; default: Python's own source")


def write(parsed: Namespace) -> int:
    """Write the files and print lm-eval's names of the tasks."""
    lengths = lengths_of(parsed.lengths)
    with disk_errors(parsed.folder):
        written = partial(write_tasks, parsed.folder, parsed.tasks, lengths, parsed.rows, parsed.seed, parsed.data)
        for name in built(written):
            print(name)
    return 0
