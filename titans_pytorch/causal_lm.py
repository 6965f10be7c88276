"""What is around the layers of every language model here: checks of ids, the loss, and sampling token by token."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Generic, NamedTuple, TypedDict, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.decoding import RowBatch, RowModel
from titans_pytorch.fast_weights.precision import at_least_float32
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.ragged import Marks, RaggedState, marks_of, read_marked, read_without_state
from titans_pytorch.ragged.packing import RealFirst, to_the_right
from titans_pytorch.ragged.state import groups_of
from titans_pytorch.sampling import evaluating, generate

State = TypeVar("State")

PREFILL_TOKENS = 4096
"""Tokens of a prompt that are read at once: enough to keep a device busy, and no more memory than a training step"""

IGNORED = -100
"""A label that counts nowhere, as in torch and transformers"""


class BatchOptions(TypedDict, total=False):
    """What language models take beside ids and a state; docs/batches.md says what each of them means."""

    embeds: Tensor | None  # (b n dim)  instead of ids
    attention_mask: Tensor | None  # (b n)  False or 0 for padding, which leaves no trace
    document_ids: Tensor | None  # (b n)  another document begins where the number changes
    cu_seqlens: Tensor | None  # (k + 1)  the same of a single row: 0, the borders between documents, n


class CallTokens(NamedTuple):
    """The tokens of a call, and what is said of them."""

    x: Tensor  # (b n) ids or (b n dim) embeddings
    are_embedded: bool
    marks: Marks | None


def next_token_loss(logits: Tensor, ids: Tensor, per_token: bool = False) -> Tensor:
    """Cross-entropy of each token but the first, in at least float32: the mean of all, or (b n-1).

    logits: (b n-1 v), ids: (b n)
    """
    logits = logits.to(at_least_float32(logits.dtype))
    targets = ids[:, 1:].long()
    if not per_token:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def loss_of_targets(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy where targets are not IGNORED, in at least float32; 0 if all are.

    logits: (b n v), targets: (b n)
    """
    logits = logits.to(at_least_float32(logits.dtype)).flatten(0, 1)
    total = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def targets_of(labels: Tensor, marks: Marks | None) -> Tensor:
    """For every token the label of the next real one of its document, IGNORED where there is none.  (b n) -> (b n)"""
    mask = None if marks is None else marks.mask
    packing = RealFirst.of(torch.ones_like(labels, dtype=torch.bool) if mask is None else mask)
    packed, is_next = packing.pack(labels.long()), packing.is_real[:, 1:]
    if marks is not None and marks.documents is not None:
        documents = packing.pack(marks.documents)
        is_next = is_next & (documents[:, 1:] == documents[:, :-1])
    targets = torch.full_like(packed, IGNORED)
    targets[:, :-1] = torch.where(is_next, packed[:, 1:], IGNORED)
    return packing.unpack(targets, IGNORED)


class CausalLM(nn.Module, Generic[State]):
    """A language model whose layers go on from a state: a subclass says how with `hidden_states` and `to_logits`."""

    num_tokens: int  # size of the vocabulary
    to_logits: nn.Linear

    def hidden_states(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """All layers, for a sequence or its next piece.  ids: (b n) -> (b n dim), and what the next piece needs"""
        raise NotImplementedError

    def hidden_of(self, x: Tensor, state: State | None = None, **reading: Any) -> tuple[Tensor, State]:
        """`hidden_states` of tokens that are embedded.  x: (b n dim)"""
        raise TypeError(f"{type(self).__name__} takes ids only, got embeds")

    def tokens(
        self,
        ids: Tensor | None,
        embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        *,
        at_least: int = 1,
    ) -> CallTokens:
        """The tokens of a call, checked."""
        if (ids is None) == (embeds is None):
            raise ValueError(f"either ids or embeds must be given, got {'neither' if ids is None else 'both'}")
        if embeds is not None:
            dim, dtype = self.to_logits.in_features, self.to_logits.weight.dtype
            tensor_checks.check_tokens("embeds", embeds, dim=dim, dtype=dtype)
            return CallTokens(embeds, True, marks_of(attention_mask, document_ids, cu_seqlens, embeds.shape[:2]))
        if not isinstance(ids, Tensor) or ids.ndim < 2:
            self.check_ids("ids", ids, at_least)  # type: ignore[arg-type]
        ids = cast(Tensor, ids)
        marks = marks_of(attention_mask, document_ids, cu_seqlens, ids.shape[:2])
        if marks is not None and marks.mask is not None and ids.ndim == 2:
            ids = ids.masked_fill(~marks.mask, 0)  # padding may have any id
        self.check_ids("ids", ids, at_least)
        return CallTokens(ids, False, marks)

    def read(self, tokens: CallTokens, state: Any, **reading: Any) -> tuple[Tensor, Any]:
        """Any tokens from any state.  -> (b n dim), 0 at padding, and the state, a `RaggedState` where rows differ"""
        read = self.reading_of(tokens, **reading)
        if tokens.marks is None and not isinstance(state, RaggedState):
            return read(tokens.x, state)
        return read_marked(read, tokens.x, tokens.marks or Marks(None, None), state)

    def read_alone(self, tokens: CallTokens, state: Any, **reading: Any) -> Tensor:
        """What `read` gives, without the state."""
        return read_without_state(self.reading_of(tokens, **reading), tokens.x, tokens.marks, state)

    def reading_of(self, tokens: CallTokens, **reading: Any) -> Callable[..., tuple[Tensor, Any]]:
        """How such tokens are read, at one position."""
        return partial(self.hidden_of if tokens.are_embedded else self.hidden_states, **reading)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every token to come next, from what the layers gave.  (... dim) -> (... num_tokens)"""
        return self.to_logits(hidden)

    def logits_and_state(
        self, ids: Tensor | None = None, state: Any = None, *, given: BatchOptions | None = None, **reading: Any
    ) -> tuple[Tensor, Any]:
        """ids: (b n) -> logits of the token after each (b n num_tokens), and what the next piece needs

        given: see `BatchOptions`; reading: further arguments of `hidden_states`
        """
        hidden, after = self.read(self.tokens(ids, **given or {}), state, **reading)
        return self.logits(hidden), after

    def logits_alone(
        self, ids: Tensor | None = None, state: Any = None, *, given: BatchOptions | None = None, **reading: Any
    ) -> Tensor:
        """The logits of `logits_and_state`: with padding, rows of different lengths are read in one call."""
        return self.logits(self.read_alone(self.tokens(ids, **given or {}), state, **reading))

    def loss(
        self,
        ids: Tensor | None = None,
        state: Any = None,
        *,
        labels: Tensor | None = None,
        embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **reading: Any,
    ) -> Tensor:
        """Mean cross-entropy of each token but the first of its document, given those before.

        Args:
            ids: (b n)
            state: of the tokens before
            labels: (b n), what the tokens should have been: ids, or -100 for those that do not count; None: ids.
                The label of a token is predicted from the real token before it
            embeds: (b n dim), instead of ids
            attention_mask: (b n), False or 0 for padding
            document_ids: (b n), another document begins where the number changes
            cu_seqlens: (k + 1), the borders between documents of a single row
            reading: further arguments of `hidden_states`
        """
        given: BatchOptions = {
            "embeds": embeds,
            "attention_mask": attention_mask,
            "document_ids": document_ids,
            "cu_seqlens": cu_seqlens,
        }
        if labels is None and embeds is None and not any(each is not None for each in given.values()):
            return self.loss_and_state(ids, state, **reading)[0]
        tokens = self.tokens(ids, **given, at_least=2)
        targets = targets_of(self.checked_labels(labels, tokens), tokens.marks)
        return loss_of_targets(self.logits(self.read_alone(tokens, state, **reading)), targets)

    def loss_and_state(
        self,
        ids: Tensor | None = None,
        state: Any = None,
        *,
        labels: Tensor | None = None,
        given: BatchOptions | None = None,
        **reading: Any,
    ) -> tuple[Tensor, Any]:
        """The loss, and the state for the piece that begins with the last real token of every row.

        Arguments as of `loss`; given: see `BatchOptions`; reading: further arguments of `hidden_states`
        """
        tokens = self.tokens(ids, **given or {}, at_least=2)
        labels = self.checked_labels(labels, tokens)
        if tokens.marks is None:
            hidden, after = self.read(tokens._replace(x=tokens.x[:, :-1]), state, **reading)
            if labels is tokens.x:
                return next_token_loss(self.logits(hidden), labels), after
            return loss_of_targets(self.logits(hidden), labels[:, 1:].long()), after
        marks = tokens.marks
        mask = torch.ones_like(labels, dtype=torch.bool) if marks.mask is None else marks.mask
        before_last = mask & (mask.flip(1).cumsum(1).flip(1) > 1)
        hidden, after = self.read(tokens._replace(marks=marks._replace(mask=before_last)), state, **reading)
        return loss_of_targets(self.logits(hidden), targets_of(labels, marks)), after

    def checked_labels(self, labels: Tensor | None, tokens: CallTokens) -> Tensor:
        """Labels (b n) of these tokens; None: their ids."""
        if labels is None:
            if tokens.are_embedded:
                raise ValueError("labels must be given with embeds, got None")
            return tokens.x
        shape = tuple(tokens.x.shape[:2])
        if not isinstance(labels, Tensor) or labels.dtype not in (torch.int32, torch.int64):
            got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
            raise TypeError(f"labels must be a tensor of int64 or int32 (batch, tokens), got {got}")
        if tuple(labels.shape) != shape:
            raise ValueError(f"labels must have the shape (batch, tokens) = {shape}, got {tuple(labels.shape)}")
        tensor_checks.check_labels("labels", labels, self.num_tokens, IGNORED)
        return labels

    def compile_loops(self) -> None:
        """Compile the loop of every memory that has one, see `NeuralMemory.compile_loop`."""
        for memory in self.modules():
            if isinstance(memory, NeuralMemory) and memory.sizes.has_loop:
                memory.compile_loop()

    def decoder(
        self,
        state: State | None,
        *,
        uses_state: bool = True,
        num_tokens: int | None = None,
        compiles: bool = False,
    ) -> Decoder[State]:
        """What sampling asks for the next token, after the tokens of `state`.

        uses_state: False reads everything again for each token, to the same end; num_tokens: will be read at most;
        compiles: decode by compiled steps
        """
        value_checks.check_switches(compile=compiles)
        if compiles and not uses_state:
            raise ValueError("compile needs the states of use_cache=True, got use_cache=False")
        if compiles and (why := self.why_by_groups):
            raise ValueError(f"compile needs a model whose rows are decoded as one batch, but {why}")
        by_rows = self.by_rows(compiles)
        return Decoder(self.reader(state, num_tokens), self.logits, state, uses_state=uses_state, by_rows=by_rows)

    def by_rows(self, compiles: bool = False) -> RowModel | None:
        """What decodes rows at positions of their own as one batch; None: `why_by_groups` says why not."""
        return None

    def why_not_by_rows(self) -> str:
        """What keeps the model from decoding by rows, as the end of a sentence; empty: nothing does."""
        return "has no way to decode rows"

    @property
    def why_by_groups(self) -> str:
        """Why rows at positions of their own are decoded group by group, in a sentence; empty: they are one batch."""
        why = self.why_not_by_rows()
        return f"rows are decoded by groups of equal length, as {type(self).__name__} {why}" if why else ""

    def reader(self, state: State | None, num_tokens: int | None) -> Callable[..., tuple[Tensor, State]]:
        """`hidden_states`, with what can be computed once for the tokens that follow; None: not known how many."""
        return self.hidden_states

    def continued(
        self,
        prompt: Tensor,
        seq_len: int,
        state: Any,
        *,
        uses_state: bool,
        attention_mask: Tensor | None = None,
        compiles: bool = False,
        **how: Any,
    ) -> Tensor:
        """The tokens after a prompt (b n), up to `seq_len` with it.  -> (b seq_len-n)

        state: of tokens that were read before the prompt (and do not count); attention_mask: (b n), False or 0 for
        padding of the prompt, wherever it is; compiles: decode by compiled steps; how: further arguments of `draw`
        """
        count = prompt.shape[1] if isinstance(prompt, Tensor) and prompt.ndim > 1 else 0
        mask = None
        if attention_mask is None:
            self.check_ids("prompt", prompt)
        else:
            mask = self.tokens(prompt, attention_mask=attention_mask).marks.mask  # type: ignore[union-attr]
            prompt, mask = to_the_right(prompt, mask)  # type: ignore[arg-type]
        value_checks.check_at_least("seq_len", seq_len, count, "the length of the prompt")
        with evaluating(self):
            decoder = self.decoder(state, uses_state=uses_state, num_tokens=seq_len, compiles=compiles)
            decoder.mask = mask
            return generate(decoder, prompt, seq_len - count, **how)

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
        by_rows: RowModel | None = None,
    ) -> None:
        self.hidden_states, self.logits = hidden_states, logits
        self.state, self.uses_state, self.by_rows = state, uses_state, by_rows
        self.batch: RowBatch | None = None  # rows at positions of their own, instead of a state
        self.read: Tensor | None = None
        self.mask: Tensor | None = None  # (b n)  of the prompt, whose last tokens are real; None: all are

    def __call__(self, ids: Tensor) -> Tensor:
        if self.uses_state and self.mask is None and ids.shape[1] == 1:
            self.go_by_rows(len(ids))
        if self.batch is not None:
            return self.batch.run(ids[:, 0])
        if self.uses_state:
            for start in range(0, ids.shape[1], PREFILL_TOKENS):
                piece = slice(start, start + PREFILL_TOKENS)
                mask = None if self.mask is None else self.mask[:, piece]
                hidden, self.state = self.hidden(ids[:, piece], mask)
            self.mask = None  # what follows a prompt is real
        else:
            if self.read is not None and self.mask is not None:
                self.mask = torch.cat((self.mask, torch.ones_like(ids, dtype=torch.bool)), dim=1)
            self.read = ids if self.read is None else torch.cat((self.read, ids), dim=1)
            hidden, _ = self.hidden(self.read, self.mask)
        return self.logits(hidden[:, -1])

    def go_by_rows(self, num_rows: int) -> None:
        """So many rows at positions of their own become one batch, if the model can decode that."""
        state, model = self.state, self.by_rows
        if model is None or state is None or not (model.compiles or isinstance(state, RaggedState)):
            return
        groups = groups_of(state)
        is_whole = sum(len(group.rows) for group in groups) == num_rows  # else it is refused where states are read
        if is_whole and all(model.fits(group.state) for group in groups):
            self.batch, self.state = RowBatch.of_groups(model.prepared(), groups), None

    def hidden(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Any]:
        """All layers, with padding and states of whatever kind."""
        if mask is None and not isinstance(self.state, RaggedState):
            return self.hidden_states(ids, self.state)
        return read_marked(self.hidden_states, ids, Marks(mask, None), self.state)
