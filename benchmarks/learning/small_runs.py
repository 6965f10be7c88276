"""Short trainings of several models on several data sets with several seeds, a line of results each."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import records
from benchmarks.machine import describe_machine
from titans_pytorch.training.errors import SettingsError, report_errors
from titans_pytorch.training.options import built, separated


@dataclass(frozen=True)
class Study:
    """What a command is made of.

    about: what --help says; models: their names, in the order of a table; settings: a dataclass of numbers, all of
    which become options; load: what --data names (None: what needs no file), with a `name`; run: (model's name, data,
    seed, settings) -> what was measured; told: that in a few words
    """

    about: str | None
    models: tuple[str, ...]
    settings: type[Any]
    load: Callable[[str | None], Any]
    run: Callable[[str, Any, int, Any], records.Record]
    told: Callable[[records.Record], str]

    def main(self, arguments: list[str] | None = None) -> int:
        return report_errors(lambda: self.measure(self.parser().parse_args(arguments)))

    def parser(self) -> argparse.ArgumentParser:
        parser = argparse.ArgumentParser(
            description=self.about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        parser.add_argument("--data", nargs="*", default=[None], help="CSV files (.gz and .xz too)")
        parser.add_argument("--out", type=Path, required=True, help="results, one line a run")
        parser.add_argument("--seeds", type=separated(int), default=(0, 1, 2), help="0,1,... [0,1,2]")
        parser.add_argument("--only", nargs="*", choices=self.models, default=self.models, help="models [all]")
        parser.add_argument("--threads", type=int, help="of torch; default: as torch has it")
        for name, default in asdict(self.settings()).items():
            option = f"--{name.replace('_', '-')}"
            parser.add_argument(option, type=type(default), default=default, help=f"[{default}]")
        return parser

    def measure(self, given: argparse.Namespace) -> int:
        """Every run that the results do not hold yet."""
        if given.threads is not None:
            torch.set_num_threads(given.threads)
        values = {name: getattr(given, name) for name in asdict(self.settings())}
        for name, value in values.items():
            if value <= 0:
                raise SettingsError(f"--{name.replace('_', '-')} must be above 0, got {value}")
        settings = built(lambda: self.settings(**values))
        done = {key(each) for each in self.load_results(given.out)}
        runs = [(data, seed, model) for data in given.data for seed in given.seeds for model in given.only]
        for path, seed, model in tqdm(runs, desc="runs", unit="run"):
            data, machine = self.load(path), describe_machine()
            about = dict(data=data.name, model=model, seed=seed, settings=asdict(settings))
            if key(about) in done:
                continue
            record = about | self.run(model, data, seed, settings)
            record["machine"] = machine | dict(torch=torch.__version__, threads=torch.get_num_threads())
            records.add(given.out, record)
            tqdm.write(f"{data.name}, {model}, seed {seed}: {self.told(record)}")
        return 0

    def load_results(self, path: Path) -> list[records.Record]:
        """All runs, by data and then in the order of the models."""
        found = records.load(path, key) if path.exists() else []
        return sorted(found, key=lambda each: (each["data"], self.models.index(each["model"]), each["seed"]))


def key(record: records.Record) -> tuple[Any, ...]:
    """What one run is told by."""
    return (record["data"], record["model"], record["seed"], str(record["settings"]))
