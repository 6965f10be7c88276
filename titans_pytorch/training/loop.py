"""The loop: step, log, validate, sample, save; the same for every model and any number of processes."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.memory.recorded import storing_costs
from titans_pytorch.memory.writes import writes_off
from titans_pytorch.training import checkpoints, data, sharding
from titans_pytorch.training.carrying import Carrying, segment
from titans_pytorch.training.checkpoints import Checkpoint, Progress
from titans_pytorch.training.compiling import compile_parts
from titans_pytorch.training.decoding import continued
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.evaluation import BITS, prime, validate
from titans_pytorch.training.next_token import NextTokenLoss
from titans_pytorch.training.optimizers import optimizers, rate, set_rate
from titans_pytorch.training.processes import check_sharding, wants_sharding
from titans_pytorch.training.runs import SAMPLES, Run
from titans_pytorch.training.settings import Training
from titans_pytorch.training.text import Text
from titans_pytorch.training.worth import OFF, OFF_BY_POSITION, ON, ON_BY_POSITION

NUM_BINS = 16  # of a sequence, for bits per byte by position
MAX_BAD_STEPS = 20  # steps in a row whose gradient is not finite
STOPPING = b"\nstopping after this step, a validation and a checkpoint; asked again: at once, without them\n"


class Trainer:
    """Trains one model in one run.

    Everything that is random is a function of (seed, step, rank), so that nothing of it has to be kept: the steps
    after a resumption are those that would have come.
    """

    def __init__(
        self,
        settings: Training,
        build: Callable[[], CausalLM[Any]],
        corpus: data.Corpus,
        text: Text,
        run: Run,
        accelerator: Any,
        resumed: Checkpoint | None = None,
    ) -> None:
        self.settings, self.build, self.corpus, self.text = settings, build, corpus, text
        self.run, self.accelerator = run, accelerator
        self.progress = Progress() if resumed is None else resumed.progress
        torch.manual_seed(settings.seed)
        self.module = build()  # without what accelerate wraps around it
        self.model_class = type(self.module)  # sharding changes it
        self.num_parameters = sum(parameter.numel() for parameter in self.module.parameters())
        if resumed is not None:
            self.module.load_state_dict(resumed.model())
        self.is_sharded = wants_sharding(settings)
        if self.is_sharded:
            check_sharding(accelerator.num_processes)
            sharding.shard(self.module, accelerator.device)
        if settings.compile:
            compile_parts(self.module)
        self.model: nn.Module = NextTokenLoss(self.module)
        if not self.is_sharded:
            loss = self.model
            self.model = accelerator.prepare_model(loss)
            loss.__dict__.pop("forward", None)  # precision is set around each call, not around forward
        self.optimizers = optimizers(self.module, settings)
        if resumed is not None:
            sharding.load_optimizer_state(self.module, self.optimizers, resumed.optimizer())
        self.skipped, self.carrying = 0, Carrying(settings.carry)
        self.is_asked_to_stop = False

    # ---- the whole training

    def train(self) -> bool:
        """Until the last step; False if somebody stopped it before."""
        tokens = (
            self.settings.batch * self.settings.accumulate * self.settings.sequence * self.accelerator.num_processes
        )
        bar = tqdm(
            total=None if self.settings.minutes else self.settings.steps,
            initial=self.progress.step,
            disable=not self.accelerator.is_main_process,
            unit="step",
            dynamic_ncols=True,
        )
        with bar, self.stoppable():
            while not self.is_over():
                began = time.perf_counter()
                loss, norm, lr = self.step()
                took = time.perf_counter() - began
                self.progress = replace(
                    self.progress, step=self.progress.step + 1, seconds=self.progress.seconds + took, bits=None
                )
                self.report(bar, loss, norm, lr, tokens / took)
                bar.update()
                self.after_step()
        return self.is_done()

    def is_over(self) -> bool:
        """Whether training ends here, for now or for good; a group of steps that carry a state is gone through."""
        return self.carrying.is_border(self.progress.step) and (self.is_asked_to_stop or self.is_done())

    def is_done(self) -> bool:
        if self.settings.minutes is None:
            return self.progress.step >= self.settings.steps
        return bool(self.share() >= 1)

    def share(self) -> float:
        """How much of the training is behind us, as a share; the same on all processes."""
        if self.settings.minutes is None:
            return self.progress.step / self.settings.steps
        share = self.progress.seconds / (60 * self.settings.minutes)
        if self.accelerator.num_processes > 1:
            share = float(self.accelerator.reduce(torch.tensor(share, device=self.accelerator.device), "mean"))
        return share

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Ctrl-C ends the training after its step and a checkpoint.  Many processes are simply ended: they resume."""
        if self.accelerator.num_processes > 1 or threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, frame: Any) -> None:
            if self.is_asked_to_stop:
                raise KeyboardInterrupt
            self.is_asked_to_stop = True
            os.write(2, STOPPING)  # print may be in the middle of something

        before = {each: signal.signal(each, ask) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    # ---- one step

    def step(self) -> tuple[float, float, float]:
        """-> loss in nats, norm of the gradient, learning rate"""
        settings, accelerator = self.settings, self.accelerator
        number, total = self.progress.step, torch.zeros((), device=accelerator.device)
        torch.manual_seed(mixed(settings.seed, number, accelerator.process_index))
        share = self.share()
        lr = rate(settings, number, share)
        set_rate(self.optimizers, lr)
        for micro in range(settings.accumulate):
            ids = self.micro_batch(number, micro)
            with self.syncing(micro == settings.accumulate - 1), accelerator.autocast():
                with storing_costs(self.module, settings.step_cost * share) as cost:
                    loss = self.carrying.loss(self.model, ids, number, micro)
                accelerator.backward((loss + cost()) / settings.accumulate)
            total += loss.detach() / settings.accumulate
        norm = self.gradient_norm()
        mean = float(accelerator.reduce(total, "mean"))
        self.check_finite(mean, norm)
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        return mean, norm, lr

    def micro_batch(self, step: int, micro: int) -> Tensor:
        """All micro-batches of a step are numbered, first those that the processes take first."""
        index = micro * self.accelerator.num_processes + self.accelerator.process_index
        settings = self.settings
        which = dict(seed=settings.seed, step=step, index=index, size=settings.batch)
        if settings.carry > 1:
            ids = segment(self.corpus, carry=settings.carry, length=settings.sequence, **which)
        else:
            ids = data.batch(self.corpus.train, length=settings.sequence + 1, **which)
        return ids.to(self.accelerator.device)

    @contextmanager
    def syncing(self, is_last: bool) -> Iterator[None]:
        """Gradients come together with the last micro-batch of a step."""
        if self.is_sharded:
            self.module.set_requires_gradient_sync(is_last)  # type: ignore[operator]
        wait = nullcontext() if is_last or self.is_sharded else self.accelerator.no_sync(self.model)
        with wait:
            yield

    def gradient_norm(self) -> float:
        """Before it is clipped."""
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        return float(sharding.gathered(norm))

    def check_finite(self, loss: float, norm: float) -> None:
        """A step whose gradient is not finite is left out; a model whose loss is not finite is lost."""
        self.skipped = 0 if math.isfinite(norm) else self.skipped + 1
        if not math.isfinite(loss) or self.skipped >= MAX_BAD_STEPS:
            what = (
                f"the loss is {loss}"
                if self.skipped < MAX_BAD_STEPS
                else f"the gradient was {norm} {MAX_BAD_STEPS} times"
            )
            raise SettingsError(
                f"training broke down at step {self.progress.step + 1}: {what}; checkpoints up to then are intact, "
                "--resume with a lower --lr or --clip goes on from the last one"
            )

    # ---- after a step

    def report(self, bar: Any, loss: float, norm: float, lr: float, speed: float) -> None:
        bits = loss * BITS / self.corpus.train_bytes_per_token
        record = dict(step=self.progress.step, loss=loss, bits_per_byte=bits, grad_norm=norm, lr=lr)
        record |= {} if self.text.unit == "byte" else {f"bits_per_{self.text.unit}": loss * BITS}
        record |= dict(tokens_per_second=round(speed, 1), seconds=round(self.progress.seconds, 3))
        bar.set_postfix_str(f"loss {loss:.3f}, {bits:.3f} bits/byte, {speed:,.0f} tokens/s", refresh=False)
        self.log(record)

    def log(self, record: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            self.run.log(record)
        if self.settings.trackers:
            scalars = {name: value for name, value in record.items() if isinstance(value, (int, float))}
            self.accelerator.log(scalars, step=self.progress.step)

    def after_step(self) -> None:
        settings, step = self.settings, self.progress.step
        is_over, is_due = self.is_over(), self.carrying.is_due
        is_new_best = False
        if is_over or is_due(step, settings.validate_every):
            bits, by_position = validate(self.model, self.corpus, settings, self.accelerator)
            is_new_best = self.progress.best is None or bits < self.progress.best
            best = bits if self.progress.best is None else min(bits, self.progress.best)
            self.progress = replace(self.progress, bits=bits, best=best)
            record = {"step": step, ON: bits, ON_BY_POSITION: in_bins(by_position), "seconds": self.progress.seconds}
            if self.is_done():
                record |= self.without_writes()
            if (unit := self.text.unit) != "byte":
                record[f"valid_bits_per_{unit}"] = bits * self.corpus.valid_bytes_per_token
            self.log(record)
            self.say(f"step {step}: {bits:.4f} bits per byte on validation text")
        if is_over or is_due(step, settings.sample_every):
            self.sample()
        if is_over or is_new_best or is_due(step, settings.checkpoint_every):
            self.save()

    def without_writes(self) -> dict[str, Any]:
        """Validation of the same model with memories that store nothing; empty where it has none."""
        with writes_off(self.module) as num_memories:
            if not num_memories:
                return {}
            bits, by_position = validate(self.model, self.corpus, self.settings, self.accelerator)
        return {OFF: bits, OFF_BY_POSITION: in_bins(by_position)}

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    def plain_model(self) -> CausalLM[Any]:
        """The model as one process has it, for samples and files.  All processes have to call this."""
        if not self.is_sharded:
            return self.module
        state = sharding.model_state(self.module)
        if not self.accelerator.is_main_process:
            return self.module
        with torch.random.fork_rng():
            plain = self.build()
        plain.load_state_dict(state)
        return plain

    def sample(self) -> None:
        """Goes on with a piece of validation text, a different one each time."""
        model, settings, step = self.plain_model(), self.settings, self.progress.step
        if self.accelerator.is_main_process:
            before = prime(self.corpus.valid, self.text, settings.prime_length, settings.seed, step)
            seed = settings.seed + step
            with torch.compiler.set_stance("force_eager"):  # one token has another shape, and would compile anew
                drawn = continued(model, before, settings.sample_length, temperature=settings.temperature, seed=seed)
            text = f"{self.text.readable(before)}┃{self.text.readable(np.array(list(drawn)))}"
            self.run.append(SAMPLES, f"---- step {step}, after ┃\n{text}\n\n")
            self.say(f"sample:\n{text}\n")
        self.accelerator.wait_for_everyone()

    def save(self) -> None:
        model, kept = self.plain_model(), sharding.optimizer_state(self.module, self.optimizers)
        if self.accelerator.is_main_process:
            self.progress = replace(self.progress, lengths=self.run.lengths())
            checkpoints.save(self.run.checkpoints, model, kept, self.progress, self.settings.keep)  # type: ignore[arg-type]
        self.accelerator.wait_for_everyone()


def in_bins(values: Tensor) -> list[float]:
    """Means over stretches of a sequence."""
    return [round(float(each.mean()), 4) for each in values.tensor_split(NUM_BINS) if len(each)]


def mixed(*numbers: int) -> int:
    """One seed of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint32)[0])


def flat(*settings: Any) -> dict[str, Any]:
    """For trackers, which take numbers and texts only."""
    values = {name: value for each in settings for name, value in asdict(each).items()}
    return {name: value if isinstance(value, (int, float, str, bool)) else str(value) for name, value in values.items()}
