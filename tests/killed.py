"""python -m tests.killed ROOT DATA: trains in ROOT/MOMENT and is killed (SIGKILL) at that moment, for every moment.

One process forks for each, so that torch is imported only once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.training_runs import train
from titans_pytorch.training import checkpoints, files, loop, runs

OPTIONS = ["--steps", "9", "--validate-every", "4", "--checkpoint-every", "3", "--keep", "2", "--sample-every", "4"]


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def on_call(number: int, function: Callable[..., Any], dying: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, but `dying` the so-manyth time."""
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return dying(*args, **kwargs) if calls == number else function(*args, **kwargs)

    return counted


def at_once(*_: Any, **__: Any) -> None:
    die()


def half_a_file(tensors: Any, path: Path) -> None:
    """What a disk has when a process dies while it writes."""
    save_file(tensors, path)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    die()


def half_a_line(self: runs.Run, name: str, text: str) -> None:
    with (self.folder / name).open("a") as file:
        file.write(text[: len(text) // 2])
    die()


def half_removed(path: Path) -> None:
    next(path.iterdir()).unlink()
    die()


save_file = checkpoints.save_file


def before_the_first_step() -> None:
    loop.Trainer.step = at_once  # type: ignore[method-assign]


def in_a_step() -> None:
    loop.Trainer.step = on_call(8, loop.Trainer.step, at_once)  # type: ignore[method-assign]


def in_a_log() -> None:
    runs.Run.append = on_call(9, runs.Run.append, half_a_line)  # type: ignore[method-assign]


def in_a_checkpoint() -> None:
    checkpoints.save_file = on_call(3, save_file, half_a_file)


def before_it_is_renamed() -> None:
    os.replace = on_call(6, os.replace, at_once)


def before_old_ones_go() -> None:
    checkpoints.prune = on_call(3, checkpoints.prune, at_once)


def while_old_ones_go() -> None:
    checkpoints.remove = on_call(1, files.remove, half_removed)


MOMENTS: list[Callable[[], None]] = [
    before_the_first_step,
    in_a_step,
    in_a_log,
    in_a_checkpoint,
    before_it_is_renamed,
    before_old_ones_go,
    while_old_ones_go,
]


def main(root: Path, data: Path) -> None:
    for moment in MOMENTS:
        if (child := os.fork()) == 0:
            moment()
            train(root / moment.__name__, data, *OPTIONS)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise RuntimeError(f"{moment.__name__} must have been killed, got status {status}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
