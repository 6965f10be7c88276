"""From a command line to a trained model: what every training script calls."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from titans_pytorch.training import checkpoints, data
from titans_pytorch.training.command_line import Parser, add_options, from_json, given, no_shared_names
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.files import explained
from titans_pytorch.training.runs import Run, new_folder, newest
from titans_pytorch.training.settings import Training, check_types, dashed

Presets = Mapping[str, Mapping[str, Any]]
RUNS = Path("runs")
STAYS = ("optimizer", "seed")  # what a resumed run cannot change, beside the model


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


def start(script: str, model_kind: type[Any], presets: Presets, arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code.  presets: settings of the model and the loop, by name"""
    return told(lambda: train(plan(script, model_kind, presets, arguments)))


def told(work: Callable[[], int]) -> int:
    """Do it; what a user can mend is told in one sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        # Said of blocks whose output is a view; nothing of ours changes it in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            return work()
        except SettingsError as error:
            print(f"error{'' if is_first() else f' in process {process()}'}: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 128 + signal.SIGINT
        except BrokenPipeError:  # whoever read our output has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def process() -> str:
    """Its number among all, as `accelerate launch` and `torchrun` say it."""
    return os.environ.get("RANK", "0")


def is_first() -> bool:
    return process() == "0"


# ---- settings


def plan(script: str, model_kind: type[Any], presets: Presets, arguments: Sequence[str] | None) -> Plan:
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
    model = replace(model, **given(parsed, model_kind))
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


# ---- training


def train(plan: Plan) -> int:
    from titans_pytorch.training.processes import accelerator, agreed

    accelerate = accelerator(plan.training)
    try:
        (folder,) = agreed([plan.run.folder])
        plan = replace(plan, run=Run(folder))
        with prepared(plan.run) if accelerate.is_main_process else nullcontext():
            return train_with(plan, accelerate)
    finally:
        accelerate.end_training()


@contextmanager
def prepared(run: Run) -> Iterator[None]:
    """The run's folder is there, ours alone, and swept."""
    with explained(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    with run.locked():
        checkpoints.sweep(run.folder)
        checkpoints.sweep(run.checkpoints)
        yield


def train_with(plan: Plan, accelerate: Any) -> int:
    from titans_pytorch.training.loop import Trainer, flat
    from titans_pytorch.training.processes import agreed

    training, run = plan.training, plan.run
    say = print if accelerate.is_main_process else nothing
    say(f"preset {plan.preset}: {plan.why}")
    folder = Path(training.data_dir)
    name, why = agreed(list(data.chosen(training.data, folder)) if accelerate.is_main_process else ["", ""])
    training = replace(training, data=name)  # a resumed run goes on with the same
    plan = replace(plan, training=training)
    with accelerate.local_main_process_first():
        corpus = data.corpus(name, folder)
    corpus.check(training.sequence)
    say(f"data: {corpus.about}{why}")
    resumed = checkpoints.last(run.checkpoints) if plan.is_resumed else None
    trainer = Trainer(training, lambda: built(plan.model), corpus, run, accelerate, resumed)
    if accelerate.is_main_process:
        run.rewind(resumed.progress.lengths if resumed else {})
        run.save_config(config(plan, trainer.model_class, trainer.num_parameters))
        run.save_text(bytes(corpus.valid[: training.sequence]))
    if training.trackers:
        accelerate.project_configuration.set_directories(str(run.folder))
        accelerate.init_trackers(run.folder.name, flat(plan.model, training))
    say(f"model: {trainer.num_parameters:,} parameters, on {accelerate.device}, {accelerate.num_processes} process(es)")
    say(f"run: {run.folder}" + (f", from step {trainer.progress.step}" if plan.is_resumed else ""))
    is_over = trainer.train()
    if trainer.progress.best is not None:
        say(f"best so far: {trainer.progress.best:.4f} bits per byte on validation text")
    if accelerate.is_main_process and training.pictures:
        show(run)
    accelerate.wait_for_everyone()
    if not is_over:
        say(f"stopped at step {trainer.progress.step}: --folder {run.folder} --resume goes on")
    return 0 if is_over else 128 + signal.SIGINT


def nothing(*_: Any) -> None:
    pass


def built(model_settings: Any) -> nn.Module:
    """What is wrong with the model's settings is the user's to mend."""
    try:
        model: nn.Module = model_settings.build()
    except (ValueError, TypeError) as error:
        raise SettingsError(f"the model cannot be built: {error}") from error
    return model


def config(plan: Plan, kind: type[nn.Module], num_parameters: int) -> dict[str, Any]:
    return {
        "script": plan.script,
        "preset": plan.preset,
        "model_class": f"{kind.__module__}.{kind.__qualname__}",
        "parameters": num_parameters,
        "model": asdict(plan.model),
        "training": asdict(plan.training),
    }


def show(run: Run) -> None:
    """The pictures, or how to get them."""
    from titans_pytorch.training.pictures import draw

    try:
        for path in draw(run):
            print(f"picture: {path}")
    except SettingsError as error:
        print(f"no picture: {error}")
