"""From a command line, presets and saved runs to a plan: which model, trained how, in which run's folder."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from titans_pytorch.training.errors import SettingsError, is_first
from titans_pytorch.training.options import Parser, add_options, built, from_json, given, no_shared_names
from titans_pytorch.training.runs import Run, new_folder, newest
from titans_pytorch.training.settings import Training, check_types, dashed

Presets = Mapping[str, Mapping[str, Any]]
RUNS = Path("runs")
STAYS = ("carry", "optimizer", "seed", "tokenizer")  # what a resumed run cannot change, beside the model


@dataclass(frozen=True)
class Plan:
    """All that a command line has decided."""

    script: str
    preset: str
    why: str
    model: Any
    training: Training
    run: Run
    is_resumed: bool


def make_plan(script: str, model_kind: type[Any], presets: Presets, arguments: Sequence[str] | None) -> Plan:
    no_shared_names([model_kind, Training])
    parsed = parser(script, model_kind, presets).parse_args(arguments)
    run, is_resumed = chosen_run(script, parsed)
    if is_resumed:
        preset, model, training = saved_settings(script, model_kind, run, parsed)
        why = f"as {run.folder} has it"
    else:
        preset, why = chosen_preset(presets, parsed)
        model, training = model_kind(), Training()
        model, training = merged(model, presets[preset]), merged(training, presets[preset])
    first = model
    model = built(lambda: replace(first, **given(parsed, model_kind)))
    if is_resumed:
        check_same("architecture", first, model)
    training = replace(training, **given(parsed, Training))
    check_types(model)
    if hasattr(model, "check"):
        model.check()
    training.check()
    return Plan(script, preset, why, model, training, run, is_resumed)


def parser(script: str, model_kind: type[Any], presets: Presets) -> Parser:
    made = Parser(prog=f"python {Path(sys.argv[0]).name}", description=sys.modules["__main__"].__doc__)
    made.add_argument("--preset", choices=tuple(presets), help="settings to begin with; default: by the device")
    made.add_argument("--folder", help=f"folder of the run; default: {RUNS}/{script}- and the time")
    made.add_argument(
        "--resume", action="store_true", help="go on with --folder, or with the newest run of this script"
    )
    add_options(made, model_kind, "the model")
    add_options(made, Training, "the training")
    return made


def chosen_run(script: str, parsed: Namespace) -> tuple[Run, bool]:
    if parsed.resume:
        run = Run(Path(parsed.folder) if parsed.folder else newest(RUNS, script))
        run.config()
        return run, True
    run = Run(Path(parsed.folder) if parsed.folder else new_folder(RUNS, script))
    if not is_first():  # whose run is the one that counts, and may be there already
        return run, False
    if run.folder.exists() and (not run.folder.is_dir() or any(run.folder.iterdir())):
        raise SettingsError(
            f"--folder must be a new folder, got {run.folder}: name another, or add --resume to go on with it"
        )
    return run, False


def chosen_preset(presets: Presets, parsed: Namespace) -> tuple[str, str]:
    if parsed.preset is not None:
        return parsed.preset, "as asked for"
    from titans_pytorch.training.processes import has_accelerator

    if has_accelerator() and getattr(parsed, "device", "auto") != "cpu":
        return "gpu", "there is an accelerator"
    return "cpu", "there is no accelerator"


def merged(settings: Any, preset: Mapping[str, Any]) -> Any:
    names = {each.name for each in fields(settings)}
    return replace(settings, **{name: value for name, value in preset.items() if name in names})


def saved_settings(script: str, model_kind: type[Any], run: Run, parsed: Namespace) -> tuple[str, Any, Training]:
    config = run.config()
    if config["script"] != script:
        raise SettingsError(
            f"--folder must be a run of this script ({script}), got {run.folder}, one of {config['script']}"
        )
    if parsed.preset not in (None, config.get("preset")):
        raise SettingsError(f"--preset must be {config.get('preset')}, as the run was started, got {parsed.preset}")
    model = from_json(model_kind, config["model"], str(run.folder))
    training = from_json(Training, config["training"], str(run.folder))
    for name in STAYS:
        if (wanted := getattr(parsed, name, getattr(training, name))) != getattr(training, name):
            raise SettingsError(f"--{name} must be {getattr(training, name)}, as the run was started, got {wanted}")
    return str(config.get("preset")), model, training


def check_same(what: str, before: Any, after: Any) -> None:
    for each in fields(before):
        old, new = getattr(before, each.name), getattr(after, each.name)
        if old != new:
            raise SettingsError(
                f"--resume must keep the {what} of the run, got --{dashed(each.name)} {new} instead of {old}"
            )
