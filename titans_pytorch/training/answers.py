"""What a model answers to a task, and what the right answers cost it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.fast_weights.precision import at_least_float32
from titans_pytorch.sampling import evaluating
from titans_pytorch.tasks import NO_ANSWER, Questions, Task

PIECE_TOKENS = 1024
"""Tokens that are read at once, so that no length needs more memory than this one and a state"""


class Answers(NamedTuple):
    """What a model says to questions."""

    guesses: Tensor  # (b n)  the most probable id after each token that is asked, elsewhere NO_ANSWER
    losses: Tensor  # (b n)  nats of the right id, 0 where nothing is asked


def loss_of(model: CausalLM[Any], questions: Questions) -> Tensor:
    """The mean cross-entropy of all answers, in nats."""
    hidden, _ = model.hidden_states(questions.ids)
    is_asked = questions.is_asked
    logits = model.logits(hidden[is_asked])
    return F.cross_entropy(logits.to(at_least_float32(logits.dtype)), questions.answers[is_asked])


@torch.no_grad()
def answers_of(model: CausalLM[Any], questions: Questions, piece: int = PIECE_TOKENS) -> Answers:
    """Read sequences piece by piece through the model's state, and answer what is asked; nothing is sampled."""
    state, found = None, []
    with evaluating(model):
        for ids, due in zip(questions.ids.split(piece, dim=1), questions.answers.split(piece, dim=1), strict=True):
            hidden, state = model.hidden_states(ids, state)
            is_asked = due != NO_ANSWER
            guesses, losses = torch.full_like(due, NO_ANSWER), hidden.new_zeros(due.shape, dtype=torch.float32)
            if is_asked.any():
                logits = model.logits(hidden[is_asked]).float()
                guesses[is_asked] = logits.argmax(dim=-1)
                losses[is_asked] = F.cross_entropy(logits, due[is_asked], reduction="none")
            found.append(Answers(guesses, losses))
    return Answers(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))


def asked(
    model: CausalLM[Any], task: Task, *, rows: int, batch: int, seed: int, piece: int = PIECE_TOKENS
) -> Iterator[tuple[Questions, Answers]]:
    """Ask a model so many sequences of a task, the same ones for every model; batches of questions and answers.

    They are drawn one by one, so that the batch decides nothing.
    """
    device, generator = next(model.parameters()).device, Generator().manual_seed(seed)
    for first in range(0, rows, batch):
        drawn = [task.draw(1, generator) for _ in range(first, min(first + batch, rows))]
        questions = Questions(*(torch.cat(parts).to(device) for parts in zip(*drawn, strict=True)))
        yield questions, answers_of(model, questions, piece)


class Score(NamedTuple):
    """How well a task was answered."""

    score: float  # by the task's metric
    num_answers: int  # that it is a mean of


def scored(model: CausalLM[Any], task: Task, *, rows: int, batch: int, seed: int, piece: int = PIECE_TOKENS) -> Score:
    """The score of a model in a task, by the task's metric: higher is better, but for bits per byte."""
    total, count = 0.0, 0
    for questions, answers in asked(model, task, rows=rows, batch=batch, seed=seed, piece=piece):
        if task.metric == "bits per byte":
            values = answers.losses[questions.is_asked] / torch.log(torch.tensor(2.0))
        else:
            values = task.marks(answers.guesses, questions).double()
        total, count = total + float(values.sum()), count + len(values)
    return Score(total / max(count, 1), count)
