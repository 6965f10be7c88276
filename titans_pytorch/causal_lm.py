"""What is around the layers of every language model here: checks of ids, the loss, and sampling token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.fast_weights.precision import at_least_float32
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.sampling import evaluating, generate

State = TypeVar("State")

PREFILL_TOKENS = 4096
"""Tokens of a prompt that are read at once: enough to keep a device busy, and no more memory than a training step"""


def next_token_loss(logits: Tensor, ids: Tensor, per_token: bool = False) -> Tensor:
    """Cross-entropy of each token but the first, in at least float32: the mean of all, or (b n-1).

    logits: (b n-1 v), ids: (b n)
    """
    logits = logits.to(at_least_float32(logits.dtype))
    targets = ids[:, 1:].long()
    if not per_token:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


class CausalLM(nn.Module, Generic[State]):
    """A language model whose layers go on from a state: a subclass says how with `hidden_states` and `to_logits`."""

    num_tokens: int  # size of the vocabulary
    to_logits: nn.Linear

    def hidden_states(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """All layers, for a sequence or its next piece.  ids: (b n) -> (b n dim), and what the next piece needs"""
        raise NotImplementedError

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token to come next, from what the layers gave.  (... dim) -> (... num_tokens)"""
        return self.to_logits(hidden)

    def logits_and_state(self, ids: Tensor, state: State | None = None, **reading: Any) -> tuple[Tensor, State]:
        """ids: (b n) -> logits of the token after each (b n num_tokens), and what the next piece needs

        reading: further arguments of `hidden_states`
        """
        self.check_ids("ids", ids)
        hidden, after = self.hidden_states(ids, state, **reading)
        return self.logits(hidden), after

    def loss(self, ids: Tensor, state: State | None = None) -> Tensor:
        """Mean cross-entropy of each token but the first, given those before.  ids: (b n)"""
        return self.loss_and_state(ids, state)[0]

    def loss_and_state(self, ids: Tensor, state: State | None = None, **reading: Any) -> tuple[Tensor, State]:
        """The mean cross-entropy of each token but the first, and the state for the piece that begins with the last.

        ids: (b n); reading: further arguments of `hidden_states`
        """
        self.check_ids("ids", ids, at_least=2)
        hidden, after = self.hidden_states(ids[:, :-1], state, **reading)
        return next_token_loss(self.logits(hidden), ids), after

    def compile_loops(self) -> None:
        """Compile the loop of every memory that has one, see `NeuralMemory.compile_loop`."""
        for memory in self.modules():
            if isinstance(memory, NeuralMemory) and memory.sizes.has_loop:
                memory.compile_loop()

    def decoder(self, state: State | None, *, uses_state: bool = True, num_tokens: int | None = None) -> Decoder[State]:
        """What sampling asks for the next token, after the tokens of `state`.

        uses_state: False reads everything again for each token, to the same end; num_tokens: will be read at most
        """
        return Decoder(self.reader(state, num_tokens), self.logits, state, uses_state=uses_state)

    def reader(self, state: State | None, num_tokens: int | None) -> Callable[..., tuple[Tensor, State]]:
        """`hidden_states`, with what can be computed once for the tokens that follow; None: not known how many."""
        return self.hidden_states

    def continued(self, prompt: Tensor, seq_len: int, state: State | None, *, uses_state: bool, **how: Any) -> Tensor:
        """The tokens after a prompt (b n), up to `seq_len` with it.  -> (b seq_len-n)

        state: of tokens that were read before the prompt (and do not count); how: further arguments of `draw`
        """
        self.check_ids("prompt", prompt)
        value_checks.check_at_least("seq_len", seq_len, prompt.shape[1], "the length of the prompt")
        with evaluating(self):
            decoder = self.decoder(state, uses_state=uses_state, num_tokens=seq_len)
            return generate(decoder, prompt, seq_len - prompt.shape[1], **how)

    def check_ids(self, name: str, ids: Tensor, at_least: int = 1) -> None:
        """Refuse what are not ids of this vocabulary (b n)."""
        tensor_checks.check_ids(name, ids, self.num_tokens, at_least)


class Decoder(Generic[State]):
    """New tokens (b n) in, logits of the token after them (b num_tokens) out; with the state or without, the same."""

    def __init__(
        self,
        hidden_states: Callable[..., tuple[Tensor, State]],
        logits: Callable[[Tensor], Tensor],
        state: State | None,
        *,
        uses_state: bool,
    ) -> None:
        self.hidden_states, self.logits = hidden_states, logits
        self.state, self.uses_state = state, uses_state
        self.read: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        if self.uses_state:
            for piece in ids.split(PREFILL_TOKENS, dim=1):
                hidden, self.state = self.hidden_states(piece, self.state)
        else:
            self.read = ids if self.read is None else torch.cat((self.read, ids), dim=1)
            hidden, _ = self.hidden_states(self.read, self.state)
        return self.logits(hidden[:, -1])
