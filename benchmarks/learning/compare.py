"""Does memory pay?  A model with it, the same frozen, a floor and a ceiling of equal parameters, side by side.

    python -m benchmarks.learning.compare benchmarks/learning/comparisons/text.json --out RESULTS.jsonl
    python -m benchmarks.learning.compare CONFIG --out RESULTS.jsonl --seeds 0 --only memory,floor --threads 1
    python -m benchmarks.learning.compare report RESULTS.jsonl --to FOLDER

Every run adds one line to the results. What is there already is not done again, and a run that was stopped goes on from
its last checkpoint (in the folder RESULTS.runs): the same command, given again, completes the file. Ctrl-C is safe.
docs/protocol.md says what is compared and why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import records
from benchmarks.learning.asking import generator_of, of_versions, quick_score, results
from benchmarks.learning.loop import training
from benchmarks.learning.protocol import Comparison, Entry, comparison_from, parameters
from benchmarks.machine import describe_machine
from titans_pytorch import storing_costs, writes_off
from titans_pytorch.training.answers import loss_of
from titans_pytorch.training.errors import SettingsError, report_errors
from titans_pytorch.training.files import writing
from titans_pytorch.training.optimizers import optimizers, rate
from titans_pytorch.training.options import built, separated

SAVE_EVERY_S = 60.0
POINTS = 10  # of a curve
LOSSES = 200  # means of the training loss that are kept


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["report"]:
        from benchmarks.learning.compare_report import main as report

        return report(arguments[1:])
    return report_errors(lambda: compare(parsed(arguments)))


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a comparison (.json), see benchmarks/learning/comparisons")
    parser.add_argument("--out", type=Path, required=True, help="results, one line a run")
    parser.add_argument("--seeds", type=separated(int), help="0,1,... instead of the config's")
    parser.add_argument("--only", type=models_named, help="memory,floor; names with commas: 'memory, frozen;floor'")
    parser.add_argument("--data", help="the task's text, a file or folder, instead of Python's own library")
    parser.add_argument("--threads", type=int, help="of torch; default: as torch has it")
    return parser.parse_args(arguments)


def models_named(text: str) -> list[str]:
    """Between semicolons, or commas where there are none."""
    return [name.strip() for name in text.split(";" if ";" in text else ",") if name.strip()]


def loaded(path: Path) -> Comparison:
    try:
        return comparison_from(json.loads(path.read_text()), "the file")
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise SettingsError(f"{path}: {error}") from error


def compare(given: argparse.Namespace) -> int:
    comparison = loaded(given.config)
    if given.seeds is not None:
        comparison = built(lambda: replace(comparison, seeds=given.seeds))
    if given.data is not None:
        comparison = replace(comparison, task=comparison.task | dict(data=given.data))
    if given.threads is not None:
        if given.threads < 1:
            raise SettingsError(f"--threads must be at least 1, got {given.threads}")
        torch.set_num_threads(given.threads)
    built(comparison.check)
    entries = comparison.entries
    names = [entry.name for entry in entries]
    if given.only is not None and not given.only:
        raise SettingsError(f"--only must be among {'; '.join(names)}, got nothing")
    if unknown := set(given.only or ()) - set(names):
        raise SettingsError(f"--only must be among {'; '.join(names)}, got {', '.join(sorted(unknown))}")
    wanted = [entry for entry in entries if given.only is None or entry.name in given.only]
    commit = describe_machine()["commit"]  # of the code that runs, whatever is checked out while it does
    done = {record["key"] for record in existing(given.out)}
    runs = [(s, b, entry) for s in comparison.seeds for b in comparison.budgets for entry in wanted]
    for seed, budget, entry in tqdm(runs, desc="runs", unit="run", disable=len(runs) == 1):
        key = key_of(comparison, entry, seed, budget)
        if key in done:
            tqdm.write(f"there already: {title(entry, seed, budget)}")
            continue
        record = run(comparison, entry, seed, budget, given.out.with_suffix(".runs") / key)
        record["machine"]["commit"] = commit
        records.add(given.out, dict(key=key, **record))
    return 0


def existing(path: Path) -> list[records.Record]:
    return records.load(path, lambda record: (record["key"],)) if path.exists() else []


def key_of(comparison: Comparison, entry: Entry, seed: int, budget: dict[str, float]) -> str:
    """One run: everything that decides its numbers, in a few letters."""
    task = {name: value for name, value in comparison.task.items() if name != "data"}
    data = Path(comparison.task["data"]).name if comparison.task.get("data") else None
    train = comparison.train_of(entry)
    decides = [task, data, entry.role, asdict(entry.settings), train, comparison.evaluation, seed, budget]
    decides += [comparison.turns] if comparison.turns else []
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
    return f"{comparison.name}-{entry.name.replace(', ', '-').replace(' ', '-')}-{seed}-{digest}"


def title(entry: Entry, seed: int, budget: dict[str, float]) -> str:
    (kind, amount), *_ = budget.items()
    return f"{entry.name}, seed {seed}, {amount:g} {kind}"


def run(comparison: Comparison, entry: Entry, seed: int, budget: dict[str, float], folder: Path) -> records.Record:
    """Train one model, ask it, and say everything that its numbers depend on."""
    machine, task = describe_machine(), comparison.make_task()
    trained = Training(comparison, entry, seed, budget, folder)
    with entry.running(trained.model):
        trained.train(title(entry, seed, budget))
        window = comparison.settings(next(iter(comparison.models or {"memory": {}}))).window
        began = time.perf_counter()
        found, versions = results(trained.model, comparison, window), of_versions(trained.model, comparison)
    off, versions_off = None, None
    if entry.role == "memory":
        with writes_off(trained.model):
            off, versions_off = results(trained.model, comparison, window), of_versions(trained.model, comparison)
    record = dict(
        comparison=comparison.name,
        **dict(model=entry.name, role=entry.role, seed=seed, budget=budget, metric=task.metric, window=window),
        **dict(parameters=parameters(entry.settings, task.num_tokens), steps=trained.number),
        **dict(seconds=round(trained.seconds, 1), asking_seconds=round(time.perf_counter() - began, 1)),
        **dict(skipped=trained.skipped, curve=trained.curve, losses=trained.means()),
        **dict(results=found, writes_off=off),
        **(dict(versions=versions, versions_writes_off=versions_off) if versions else {}),
        settings=dict(
            **dict(task=without_path(comparison.task), model=asdict(entry.settings), train=comparison.train_of(entry)),
            **(dict(turns=comparison.turns) if comparison.turns else {}),
            evaluation=asdict(comparison.asking),
        ),
        machine=machine | dict(torch=torch.__version__, threads=torch.get_num_threads()),
    )
    first = next(iter(found.values()))
    tqdm.write(f"{title(entry, seed, budget)}: {first.get('score', float('nan')):.4f} ({task.metric})")
    return record


def without_path(task: dict[str, Any]) -> dict[str, Any]:
    """A task's settings, of whose data only the name is kept."""
    return task | ({"data": Path(task["data"]).name} if task.get("data") else {})


class Training:
    """The training of one model, which goes on where it was stopped.

    Batches depend on the seed and the step alone, so that all models see the same.
    """

    def __init__(self, comparison: Comparison, entry: Entry, seed: int, budget: dict[str, float], folder: Path) -> None:
        self.comparison, self.entry, self.seed, self.budget = comparison, entry, seed, budget
        self.folder, self.task = folder, comparison.make_task()
        self.turns = [comparison.turn(number) for number in range(max(len(comparison.turns), 1))]
        self.settings = comparison.training(seed, int(budget.get("steps", 1)))
        torch.manual_seed(seed)
        self.model = entry.build(self.task)
        (self.optimizer,) = optimizers(self.model, replace(self.settings, optimizer="adamw"))
        self.number, self.seconds, self.skipped = 0, 0.0, 0
        self.curve: list[list[float]] = []  # step, seconds, score
        self.losses: list[float] = []
        if self.path.exists():
            self.load()

    @property
    def path(self) -> Path:
        return self.folder / "last.pt"

    def share(self, step: int, seconds: float) -> float:
        """How much of the training is behind us."""
        if "steps" in self.budget:
            return step / self.budget["steps"]
        return seconds / self.budget["seconds"]

    def train(self, title: str) -> None:
        """Until the budget is spent."""
        if self.share(self.number, self.seconds) >= 1:
            return
        steps = training(
            self.model,
            self.optimizer,
            self.loss,
            lambda step, seconds: rate(self.settings, step, self.share(step, seconds)) / self.settings.lr,
            self.settings.clip,
            self.number,
            self.seconds,
        )
        saved, bar = (
            time.monotonic(),
            tqdm(desc=title, total=100, initial=int(100 * self.progress), unit="%", leave=False),
        )
        with bar:
            for step in steps:
                self.number, self.seconds = step.number, step.seconds
                self.skipped += not step.is_taken
                self.losses.append(step.loss)
                bar.set_postfix_str(f"step {step.number}, loss {step.loss:.3f}", refresh=False)
                bar.update(int(100 * self.progress) - bar.n)
                if self.progress * POINTS >= len(self.curve) + 1:
                    score = quick_score(self.model, self.task, self.comparison.asking)
                    self.curve.append([self.number, round(self.seconds, 2), score])
                if self.progress >= 1 or time.monotonic() - saved > SAVE_EVERY_S:
                    self.save()
                    saved = time.monotonic()
                if self.progress >= 1:
                    return

    def loss(self, step: int) -> Tensor:
        task, batch = self.turns[step % len(self.turns)]
        with storing_costs(self.model, self.settings.step_cost * self.progress) as cost:
            loss = loss_of(self.model, task.draw(batch, generator_of(self.seed, step)))
        return loss + cost()

    @property
    def progress(self) -> float:
        return min(self.share(self.number, self.seconds), 1.0)

    def means(self) -> list[float]:
        """Training losses, in at most so many means."""
        size = -(-len(self.losses) // LOSSES)
        parts = [self.losses[i : i + size] for i in range(0, len(self.losses), max(size, 1))]
        return [round(sum(part) / len(part), 4) for part in parts]

    def save(self) -> None:
        kept = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), number=self.number)
        kept |= dict(seconds=self.seconds, skipped=self.skipped, curve=self.curve, losses=self.losses)
        with writing(self.path) as temporary:
            torch.save(kept, temporary)

    def load(self) -> None:
        kept = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(kept.pop("model"))
        self.optimizer.load_state_dict(kept.pop("optimizer"))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr  # the loop takes shares of it
        for name, value in kept.items():
            setattr(self, name, value)


if __name__ == "__main__":
    raise SystemExit(main())
