"""`titans-pytorch`: what to do with a trained run, and what to ask other models.

titans-pytorch sample RUN --prompt "def "        goes on with a text, token by token as they come
titans-pytorch plot RUN                          draws its curves and what surprised it
titans-pytorch eval RUN --tasks niah --lengths 4k   asks it tasks at many lengths
titans-pytorch tasks FOLDER --lengths 1k,4k      writes such tasks for lm-eval
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from titans_pytorch.training.decoding import continued
from titans_pytorch.training.errors import SettingsError, report_errors
from titans_pytorch.training.eval_command import add_eval, evaluate
from titans_pytorch.training.options import Parser, named
from titans_pytorch.training.runs import Run
from titans_pytorch.training.tasks_command import add_tasks, write


def main(arguments: Sequence[str] | None = None) -> int:
    return report_errors(lambda: run(arguments))


def run(arguments: Sequence[str] | None) -> int:
    parsed = parser().parse_args(arguments)
    if parsed.command is None:
        raise SettingsError("titans-pytorch needs a command, sample, plot, eval or tasks, got none")
    return {"sample": sample, "plot": plot, "eval": evaluation, "tasks": write}[parsed.command](parsed)


def parser() -> Parser:
    made = Parser(prog="titans-pytorch", description="What to do with a trained run.")
    commands = made.add_subparsers(dest="command", metavar="sample | plot | eval | tasks")
    each = commands.add_parser("sample", help="go on with a text")
    each.add_argument("run", type=Path, help="folder of the run")
    each.add_argument("--prompt", help="text to go on with")
    each.add_argument("--prompt-file", type=Path, help="file with it, of any length")
    each.add_argument("--length", type=named(int), default=512, metavar="N", help="tokens to write [512]")
    each.add_argument("--temperature", type=named(float), default=1.0, metavar="X", help="0: the most probable [1]")
    each.add_argument("--seed", type=named(int), default=0, metavar="N", help="makes it repeatable [0]")
    each.add_argument("--checkpoint", choices=("best", "last"), default="best", help="[best]")
    each.add_argument("--device", default="auto", help="cpu, cuda, ... [auto]")
    each = commands.add_parser("plot", help="draw its curves and what surprised it")
    each.add_argument("run", type=Path, help="folder of the run")
    each.add_argument("--text", type=Path, help="file whose beginning is drawn; default: validation text")
    add_eval(commands)
    add_tasks(commands)
    return made


def evaluation(parsed: Namespace) -> int:
    return evaluate(parsed, device(parsed.device))


def sample(parsed: Namespace) -> int:
    if parsed.length < 1:
        raise SettingsError(f"--length must be at least 1, got {parsed.length}")
    if not 0 <= parsed.temperature < float("inf"):
        raise SettingsError(f"--temperature must be at least 0, got {parsed.temperature}")
    if parsed.seed < 0:
        raise SettingsError(f"--seed must be at least 0, got {parsed.seed}")
    given, run = prompt(parsed), Run(parsed.run)
    model, _ = run.model(parsed.checkpoint)
    model.to(device(parsed.device))
    text = run.text_kind()
    decode = text.decoder()
    for token in continued(model, text.encode(given), parsed.length, temperature=parsed.temperature, seed=parsed.seed):
        print(decode(token), end="", flush=True)
    print()
    return 0


def prompt(parsed: Namespace) -> bytes:
    if (parsed.prompt is None) == (parsed.prompt_file is None):
        raise SettingsError(
            "sample needs either --prompt or --prompt-file, got " + ("both", "none")[parsed.prompt is None]
        )
    text = contents(parsed.prompt_file) if parsed.prompt is None else parsed.prompt.encode("utf-8", "surrogateescape")
    if not text:
        raise SettingsError("the prompt must have at least one byte, got an empty one")
    return text


def contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None


def device(name: str) -> str:
    import torch

    if name == "auto":
        return str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):
        raise SettingsError(f"--device must be one that torch has here, got {name!r}") from None
    return name


def plot(parsed: Namespace) -> int:
    from titans_pytorch.training.pictures import draw

    for path in draw(Run(parsed.run), contents(parsed.text) if parsed.text else None):
        print(f"picture: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
