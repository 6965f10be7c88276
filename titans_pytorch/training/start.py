"""From a command line to a trained model: what every training script calls."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.public_names import public_name
from titans_pytorch.training import checkpoints, data
from titans_pytorch.training.allocator import keep_freed_memory
from titans_pytorch.training.errors import SettingsError, report_errors
from titans_pytorch.training.files import disk_errors
from titans_pytorch.training.plan import Plan, Presets, make_plan
from titans_pytorch.training.runs import Run
from titans_pytorch.training.text import Text, text_of
from titans_pytorch.training.worth import worth


def start(script: str, model_kind: type[Any], presets: Presets, arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; the exit code.

    presets: settings of the model and the loop, by name; arguments: instead of those of this process, which then is not
    only there to train
    """
    if arguments is None:
        keep_freed_memory()
    return report_errors(lambda: train(make_plan(script, model_kind, presets, arguments)))


def train(plan: Plan) -> int:
    from titans_pytorch.training.processes import accelerator, broadcast

    accelerate = accelerator(plan.training)
    try:
        (folder,) = broadcast([plan.run.folder])
        plan = replace(plan, run=Run(folder))
        with run_folder(plan.run) if accelerate.is_main_process else nullcontext():
            return train_with(plan, accelerate)
    finally:
        accelerate.end_training()


@contextmanager
def run_folder(run: Run) -> Iterator[None]:
    """The run's folder is there, ours alone, and swept."""
    with disk_errors(run.folder):
        run.folder.mkdir(parents=True, exist_ok=True)
    with run.locked():
        checkpoints.sweep(run.folder)
        checkpoints.sweep(run.checkpoints)
        yield


def train_with(plan: Plan, accelerate: Any) -> int:
    from titans_pytorch.training.loop import Trainer, flat
    from titans_pytorch.training.processes import broadcast

    training, run = plan.training, plan.run
    say = print if accelerate.is_main_process else say_nothing
    say(f"preset {plan.preset}: {plan.why}")
    text = run.text_kind() if plan.is_resumed else text_of(training.tokenizer)
    folder = Path(training.data_dir)
    name, why = broadcast(list(data.choose_data(training.data, folder)) if accelerate.is_main_process else ["", ""])
    training = replace(training, data=name)  # a resumed run goes on with the same
    plan = replace(plan, training=training)
    with accelerate.local_main_process_first():
        corpus = data.tokenized(data.corpus(name, folder), text)
    corpus.check(training.sequence, text.unit, training.carry)
    say(f"data: {corpus.about}{why}")
    resumed = checkpoints.last(run.checkpoints) if plan.is_resumed else None
    trainer = Trainer(training, lambda: built(plan.model, text), corpus, text, run, accelerate, resumed)
    if accelerate.is_main_process:
        run.rewind(resumed.progress.lengths if resumed else {})
        run.save_tokenizer(training.tokenizer)  # before the settings, with which the run can be resumed
        run.save_config(config(plan, trainer.model_class, trainer.num_parameters))
        run.save_text(b"".join(text.pieces(corpus.valid[: training.sequence])))
    if training.trackers:
        accelerate.project_configuration.set_directories(str(run.folder))
        accelerate.init_trackers(run.folder.name, flat(plan.model, training))
    say(f"model: {trainer.num_parameters:,} parameters, on {accelerate.device}, {accelerate.num_processes} process(es)")
    say(f"run: {run.folder}" + (f", from step {trainer.progress.step}" if plan.is_resumed else ""))
    is_over = trainer.train()
    if trainer.progress.best is not None:
        say(f"best so far: {trainer.progress.best:.4f} bits per byte on validation text")
    if accelerate.is_main_process and (sentence := worth(run.metrics())) is not None:
        say(sentence)
    if accelerate.is_main_process and training.pictures:
        show(run)
    accelerate.wait_for_everyone()
    if not is_over:
        say(f"stopped at step {trainer.progress.step}: --folder {run.folder} --resume goes on")
    return 0 if is_over else 128 + signal.SIGINT


def say_nothing(*_: Any) -> None:
    pass


def built(model_settings: Any, text: Text) -> CausalLM[Any]:
    """What is wrong with the model's settings is the user's to mend."""
    try:
        model: CausalLM[Any] = model_settings.build(text.num_tokens)
    except (ValueError, TypeError) as error:
        raise SettingsError(f"the model cannot be built: {error}") from error
    return model


def config(plan: Plan, kind: type[nn.Module], num_parameters: int) -> dict[str, Any]:
    return {
        "script": plan.script,
        "preset": plan.preset,
        "model_class": public_name(kind),
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
