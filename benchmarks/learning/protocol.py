"""What a comparison holds fixed: which models stand beside each other, of how many parameters, and what recovery is.

docs/protocol.md says it in words.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from titans_pytorch import writes_off
from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.checks.field_checks import check_fields
from titans_pytorch.tasks import Task, make_task
from titans_pytorch.training.last_token import LastTokenReader
from titans_pytorch.training.models import MACModel, PaperModel, size
from titans_pytorch.training.options import from_json
from titans_pytorch.training.settings import Training

KINDS: dict[str, type[Any]] = {"titans": PaperModel, "mac": MACModel}
FLOOR, CEILING, FROZEN = "floor", "ceiling", "frozen"
ROLES = ("memory", FROZEN, FLOOR, CEILING)
WITHIN = 0.001
LENGTHS = (1, 4, 16, 64)
"""Times the trained length that a model is asked at"""


@dataclass(frozen=True)
class Evaluation:
    """What a trained model is asked.

    lengths: times the trained one; rows: sequences of each; depths: of needles, for a map; bins: first positions
    versions: settings of the task that differ from those it was trained on, by name, which are asked, too; with `rows`,
        so many sequences of them
    """

    lengths: tuple[int, ...] = LENGTHS
    rows: int = 64
    batch: int = 8
    seed: int = 1_000_000
    depths: int = 0
    bins: tuple[int, ...] = (0, 32, 128, 256, 512, 1024, 2048, 4096)
    versions: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "evaluation.{}".format)
        if not self.lengths:
            raise ValueError("evaluation.lengths must be at least one, got none")
        at_least = dict(rows=1, batch=1, seed=0, depths=0)
        for name, smallest in at_least.items():
            if (value := getattr(self, name)) < smallest:
                raise ValueError(f"evaluation.{name} must be at least {smallest}, got {value}")
        if min(self.lengths) < 1:
            raise ValueError(f"evaluation.lengths must be at least 1, got {list(self.lengths)}")


@dataclass(frozen=True)
class Comparison:
    """One setting: a task, a model with memory and what stands beside it, how they are trained and asked.

    models: settings that differ from `model`, by name, each of which is a model with memory; the first one is what
        floor and ceiling have as many parameters as
    budgets: of steps, or of seconds of training; several are several runs of everything
    widened: feed-forward networks of all models are widened until they have the parameters of the largest
    turns: settings of the task and `batch` that differ from `task` and `train`, which training steps take in turn; what
        is asked is `task`
    """

    name: str
    task: dict[str, Any]
    model: dict[str, Any]
    train: dict[str, Any]
    budgets: tuple[dict[str, float], ...] = ({"steps": 500},)
    models: dict[str, dict[str, Any]] | None = None
    roles: tuple[str, ...] = ROLES
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluation: dict[str, Any] | None = None
    within: float = WITHIN
    widened: bool = False
    turns: tuple[dict[str, Any], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("roles", "seeds", "budgets"):
            if not (given := getattr(self, name)) or any(given.count(each) > 1 for each in given):
                raise ValueError(f"{name} must be at least one, and different ones, got {list(given)}")
        if unknown := set(self.roles) - set(ROLES):
            raise ValueError(f"roles must be among {', '.join(ROLES)}, got {', '.join(sorted(unknown))}")
        if any(seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds must be at least 0, got {list(self.seeds)}")
        for budget in self.budgets:
            if len(budget) != 1 or not set(budget) <= {"steps", "seconds"} or not all(v > 0 for v in budget.values()):
                raise ValueError(f"a budget must be steps or seconds, above 0, got {budget}")
        if not isinstance(self.task.get("name"), str):
            raise ValueError(f"task.name must be the name of a task, got {self.task.get('name')!r}")
        if self.model.get("kind") not in KINDS:
            raise ValueError(f"model.kind must be one of {', '.join(KINDS)}, got {self.model.get('kind')!r}")

    def check(self) -> None:
        """Refuse what could not be trained or asked, before anything is."""
        self.training(self.seeds[0], 1).check()
        task, asking = self.make_task(), self.asking
        if task.reads_last and set(asking.lengths) != {1}:
            raise ValueError(f"{self.task['name']} needs evaluation.lengths [1], got {asking.lengths}")
        if asking.depths > 1 and not hasattr(task, "depth"):
            raise ValueError(
                f"evaluation.depths must be 0 for {self.task['name']}, which has none, got {asking.depths}"
            )
        if self.task.get("data") is not None and not getattr(task, "reads_data", True):
            raise ValueError(f"data must be left out where a task does not read it, got {self.task['data']!r}")
        self.check_versions()
        for entry in self.entries:
            parameters(entry.settings, task.num_tokens)

    def training(self, seed: int, steps: int) -> Training:
        return from_json(Training, self.train | dict(seed=seed, steps=steps), "train")

    def train_of(self, entry: Entry) -> dict[str, Any]:
        """How a model is trained, without what only bears on memories where it has none."""
        without = set() if entry.settings.memory else {"step_cost"}
        return {name: value for name, value in self.train.items() if name not in without}

    @property
    def asking(self) -> Evaluation:
        return from_json(Evaluation, self.evaluation or {}, "evaluation")

    def make_task(self, **more: Any) -> Task:
        options = {name: value for name, value in self.task.items() if name != "name"}
        return make_task(self.task["name"], **options | more)

    def changed(self, changes: dict[str, Any]) -> Task:
        """A version of the task; how many sequences of it there are is not its own."""
        return self.make_task(**{name: value for name, value in changes.items() if name not in ("rows", "batch")})

    def turn(self, step: int) -> tuple[Task, int]:
        """What a training step is of, and how many sequences."""
        changes = self.turns[step % len(self.turns)] if self.turns else {}
        return self.changed(changes), changes.get("batch", self.training(0, 1).batch)

    def check_versions(self) -> None:
        """Refuse a version of the task whose ids mean something else to a model that was trained on the task."""
        known = self.make_task().num_tokens
        turns = {f"turn {number}": self.turn(number)[0] for number in range(len(self.turns))}
        asked = {name: self.changed(changes) for name, changes in self.asking.versions.items()}
        for name, task in {**turns, **asked}.items():
            if task.num_tokens != known:
                raise ValueError(
                    f"turns and evaluation.versions must have the task's {known} ids, got {task.num_tokens} in {name}"
                )

    def settings(self, name: str) -> Any:
        """The model with memory of this name."""
        given = self.given_settings(name)
        if not self.widened:
            return given
        return of_equal_size(self.largest, given, self.make_task().num_tokens, self.within)

    @cached_property
    def largest(self) -> Any:
        """The model with memory that has the most parameters, as it is given."""
        num_tokens = self.make_task().num_tokens
        given = [self.given_settings(name) for name in self.models or {"memory": {}}]
        return max(given, key=lambda settings: parameters(settings, num_tokens))

    def given_settings(self, name: str) -> Any:
        """Those of the file."""
        own = (self.models or {"memory": {}})[name]
        kind, merged = KINDS[self.model["kind"]], self.model | own
        if unknown := set(merged) - {"kind", *(each.name for each in fields(kind))}:
            raise ValueError(f"model must hold settings of {kind.__name__}, got {', '.join(sorted(unknown))}")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in merged.items()}
        return kind(**{key: value for key, value in values.items() if key != "kind"})

    @property
    def entries(self) -> list[Entry]:
        """Everything that is trained, in its order."""
        names = list(self.models or {"memory": {}})
        found = [Entry(name, "memory", self.settings(name)) for name in names if "memory" in self.roles]
        if FROZEN in self.roles:
            found += [Entry(f"{name}, {FROZEN}", FROZEN, self.settings(name)) for name in names]
        first, num_tokens = self.settings(names[0]), self.make_task().num_tokens
        if FLOOR in self.roles:
            found.append(Entry(FLOOR, FLOOR, floor_of(first, num_tokens, self.within)))
        if CEILING in self.roles:
            longest = max(self.asking.lengths) * self.make_task().tokens  # type: ignore[attr-defined]
            found.append(Entry(CEILING, CEILING, ceiling_of(first, longest, num_tokens, self.within)))
        return found


@dataclass(frozen=True)
class Entry:
    """One model of a comparison.  role: memory, frozen (its writes are off, in training too), floor or ceiling"""

    name: str
    role: str
    settings: Any

    def build(self, task: Any) -> CausalLM[Any]:
        """The model, with a decoder of its last token where the task wants one."""
        model: CausalLM[Any] = self.settings.build(task.num_tokens)
        return LastTokenReader(model, task.tokens) if task.reads_last else model

    def running(self, model: nn.Module) -> AbstractContextManager[Any]:
        """How it is run, in training and afterwards."""
        return writes_off(model) if self.role == FROZEN else nullcontext()


# ---- models of equal parameters


def floor_of(settings: Any, num_tokens: int, within: float = WITHIN) -> Any:
    """The model without memory, its feed-forward networks widened until it has as many parameters."""
    return of_equal_size(settings, replace(settings, memory=False), num_tokens, within)


def ceiling_of(settings: Any, longest: int, num_tokens: int, within: float = WITHIN) -> Any:
    """The model without memory whose attention sees all of the longest sequence, of as many parameters."""
    bare = replace(settings, memory=False, window=longest)
    if isinstance(settings, PaperModel):
        bare = replace(bare, variant="mag")  # a window over all of a sequence is full attention; LMM has none
    return of_equal_size(settings, bare, num_tokens, within)


def of_equal_size(wanted: Any, bare: Any, num_tokens: int, within: float) -> Any:
    """`bare`, with feed-forward networks of the width that brings it to the parameters of `wanted`."""
    target = parameters(wanted, num_tokens)
    if isinstance(bare, PaperModel):
        width = matched_width(lambda width: parameters(replace(bare, ff_hidden=width), num_tokens), target)
        bare = replace(bare, ff_hidden=width)
    got = parameters(bare, num_tokens)  # MACModel widens itself
    if abs(got / target - 1) > within:
        raise ValueError(
            f"models that are compared must come within {within:.3%} of {target:,} parameters, got {got:,} at best: "
            "take a wider model, or allow more with `within`"
        )
    return bare


def matched_width(parameters_at: Callable[[int], int], target: int) -> int:
    """The width at which a model whose parameters grow evenly with it comes nearest to a number of parameters."""
    first, each = parameters_at(1), parameters_at(2) - parameters_at(1)
    return max(1, 1 + round((target - first) / each))


def parameters(settings: Any, num_tokens: int) -> int:
    """Of a model with these settings, which is only counted."""
    with torch.device("meta"):
        return size(settings.build(num_tokens))


def recovery(score: float, floor: float, ceiling: float) -> float | None:
    """The share of what full attention wins over no memory that a model wins; None where it wins nothing.

    Bits per byte go in with a minus: the order is what counts, higher being better.
    """
    if not all(map(math.isfinite, (score, floor, ceiling))) or ceiling <= floor:
        return None
    return (score - floor) / (ceiling - floor)


def comparison_from(loaded: Any, where: str) -> Comparison:
    """A comparison as a file holds it."""
    if isinstance(loaded, dict):
        known = {each.name for each in fields(Comparison)}
        if missing := {"name", "task", "model", "train"} - set(loaded):
            raise ValueError(f"{where} must name {', '.join(sorted(missing))}, got {', '.join(loaded) or 'nothing'}")
        if unknown := set(loaded) - known:
            raise ValueError(f"{where} must hold a comparison's {', '.join(sorted(known))}, got {', '.join(unknown)}")
        return Comparison(**loaded)
    raise ValueError(f"{where} must hold a comparison, got {type(loaded).__name__}")
