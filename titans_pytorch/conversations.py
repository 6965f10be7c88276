"""Many conversations with one model, each at a position of its own: opened, continued, forked, taken back, put away."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from titans_pytorch.causal_lm import CausalLM
from titans_pytorch.checks.value_checks import check_switches
from titans_pytorch.decoding import RowBatch, RowModel
from titans_pytorch.ragged.reading import with_ends
from titans_pytorch.ragged.state import Group, RaggedState, position
from titans_pytorch.sampling import evaluating
from titans_pytorch.state_files import State, state_from_bytes, state_to_bytes


class ConversationPoint(NamedTuple):
    """A point of a conversation: a row of a state that those share which were read together."""

    state: Any  # of the model; None: nothing has been read
    row: int

    @property
    def num_tokens(self) -> int:
        """How many tokens have been read."""
        return position(self.state)

    def alone(self) -> State | None:
        """The state of this conversation by itself."""
        return None if self.state is None else self.state.select([self.row])


class LiveRow(NamedTuple):
    """A conversation that is decoded as a row of a batch, which moves on."""

    batch: RowBatch
    row: int

    @property
    def num_tokens(self) -> int:
        """How many tokens have been read."""
        return self.batch.positions[self.row]

    def alone(self) -> State:
        """The state of this conversation by itself, as a copy."""
        state: State = self.batch.state(self.row)
        return state

    def settled(self) -> ConversationPoint:
        """Where the conversation is now, as a value."""
        return ConversationPoint(self.alone(), 0)


class ConversationPool:
    """The states of many conversations, which are decoded together, each at a position of its own.

        pool = ConversationPool(model)
        ann, bob = pool.open(), pool.open()
        logits = pool.advance({ann: ids, bob: other_ids})    # any lengths; of the token after the last, (num_tokens)
        draft = pool.fork(ann)                               # goes on by itself, and copies nothing
        point = pool.keep(ann)
        pool.advance({ann: more_ids})
        pool.rollback(ann, point)                            # as if the last call had not been
        data = pool.snapshot(bob)                            # bytes; pool.restore(data) opens it again, anywhere
        pool.close(bob)

    Conversations that were read together share one state until they part, so that going on together copies nothing.
    Conversations that are given one token each at different positions become rows of one batch, and stay so as long as
    they go on together (`why_by_groups` says why not, where a model cannot); then to keep or fork one copies its state.
    Every answer is what the conversation alone would get. No gradients; for one thread.

    Args:
        model: of this library
        compile: read single tokens with steps that `torch.compile` makes, in graphs that serve every token; another
            number of conversations that go on together makes others, at most twice
    """

    def __init__(self, model: CausalLM[Any], *, compile: bool = False) -> None:
        if not isinstance(model, CausalLM):
            raise TypeError(f"model must be a language model of this library, got {type(model).__name__}")
        check_switches(compile=compile)
        if compile and (why := model.why_by_groups):
            raise ValueError(f"compile needs a model whose rows are decoded as one batch, but {why}")
        self.model, self.compiles = model, compile
        self.points: dict[int, ConversationPoint | LiveRow] = {}
        self.num_opened = 0

    def __len__(self) -> int:
        return len(self.points)

    def __contains__(self, conversation: object) -> bool:
        return conversation in self.points

    @property
    def why_by_groups(self) -> str:
        """Why conversations at different positions are decoded one group after the other; empty: they are one batch."""
        return self.model.why_by_groups

    def open(self, state: Any = None) -> int:
        """A new conversation, which has read nothing, or what a state of a single sequence has.  -> its number"""
        if state is not None and not hasattr(state, "batch"):
            raise TypeError(f"state must be one of the model, got {type(state).__name__}; tokens are for advance")
        if state is not None and state.batch != 1:
            raise ValueError(f"state must be of one sequence, got {state.batch}")
        if isinstance(state, RaggedState):
            state = state.states[0]
        return self.enter(ConversationPoint(state, 0))

    def close(self, conversation: int) -> None:
        """Forget a conversation."""
        self.point(conversation)
        del self.points[conversation]

    def num_tokens(self, conversation: int) -> int:
        """How many tokens it has read."""
        return self.point(conversation).num_tokens

    @torch.no_grad()
    def advance(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Read the next tokens of some conversations.  tokens: ids (n) of each -> logits behind its last"""
        if not tokens:
            return {}
        for conversation, ids in tokens.items():
            self.point(conversation)
            if not isinstance(ids, Tensor) or ids.ndim != 1 or len(ids) == 0:
                got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
                raise ValueError(f"tokens of a conversation must be ids (n), at least one, got {got}")
            self.model.check_ids("tokens", ids[None])
        with evaluating(self.model):
            model = self.model.by_rows(self.compiles)
            together = [] if model is None else self.spread(tokens, model)
            found = {} if model is None or not together else self.advance_rows(model, together, tokens)
            if rest := [each for each in tokens if each not in found]:
                found |= self.advance_groups(rest, tokens)
        self.part()
        return {each: found[each] for each in tokens}

    def advance_groups(self, some: list[int], tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Any number of tokens for each of some conversations; those at one position go on together."""
        for each in some:
            point = self.points[each]
            self.points[each] = point.settled() if isinstance(point, LiveRow) else point
        order = sorted(some, key=self.place_of)
        lengths = [len(tokens[each]) for each in order]
        x = nn.utils.rnn.pad_sequence([tokens[each] for each in order], batch_first=True)
        hidden, after = with_ends(self.model.hidden_states, x, lengths, self.groups(order))
        last = torch.tensor(lengths, device=x.device) - 1
        logits = self.model.logits(hidden[torch.arange(len(order), device=x.device), last])
        for rows, state in after:
            for place, row in enumerate(rows):
                self.points[order[row]] = ConversationPoint(state, place)
        return dict(zip(order, logits, strict=True))

    def advance_rows(self, model: RowModel, some: list[int], tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """One token for each of some conversations, as one batch."""
        batch, order = self.batch_of(model, some)
        return dict(zip(order, batch.run(torch.cat([tokens[each] for each in order])), strict=True))

    def fork(self, conversation: int) -> int:
        """Another conversation that has read the same.  -> its number"""
        return self.enter(self.keep(conversation))

    def keep(self, conversation: int) -> ConversationPoint:
        """Where a conversation is, to come back to by `rollback`."""
        point = self.point(conversation)
        return point.settled() if isinstance(point, LiveRow) else point

    def rollback(self, conversation: int, point: ConversationPoint) -> None:
        """Take back all that was read since a point that was kept."""
        self.point(conversation)
        if not isinstance(point, ConversationPoint):
            raise TypeError(f"point must be what keep returned, got {type(point).__name__}")
        self.points[conversation] = point

    def snapshot(self, conversation: int) -> bytes:
        """A conversation as bytes, with the fingerprint of the model; its state only, not its tokens."""
        state = self.point(conversation).alone()
        if state is None:
            raise ValueError(f"conversation {conversation} must have read a token to be kept as bytes, got none")
        return state_to_bytes(state, self.model)

    def restore(self, data: bytes) -> int:
        """Open what `snapshot` gave, of this model with these weights.  -> its number"""
        device = next(self.model.parameters()).device
        return self.open(state_from_bytes(data, device, self.model))

    def state(self, conversation: int) -> State | None:
        """The state of a conversation, of one sequence; None: it has read nothing."""
        return self.point(conversation).alone()

    # ---- what is shared

    def place_of(self, conversation: int) -> tuple[int, int, int]:
        """In this order conversations that share a state or a batch stand as they do in it."""
        point = self.points[conversation]
        if isinstance(point, LiveRow):
            return -1, id(point.batch), point.row
        return point.num_tokens, id(point.state), point.row

    def point(self, conversation: int) -> ConversationPoint | LiveRow:
        """Where a conversation is."""
        if conversation not in self.points:
            raise KeyError(f"conversation must be open, got {conversation!r}")
        return self.points[conversation]

    def enter(self, point: ConversationPoint) -> int:
        """A new conversation at a point."""
        self.num_opened += 1
        self.points[self.num_opened] = point
        return self.num_opened

    def spread(self, tokens: Mapping[int, Tensor], model: RowModel) -> list[int]:
        """Those that become rows: they have one token to read and are at different positions, or were rows before.

        With compiled steps they are rows at once.
        """
        single = [
            each
            for each, ids in tokens.items()
            if len(ids) == 1 and (isinstance(point := self.points[each], LiveRow) or model.fits(point.state))
        ]
        is_live = any(isinstance(self.points[each], LiveRow) for each in single)
        return single if is_live or model.compiles or len({self.points[each].num_tokens for each in single}) > 1 else []

    def batch_of(self, model: RowModel, some: list[int]) -> tuple[RowBatch, list[int]]:
        """Conversations as one batch, and in which order: the one that they are already, or a new one."""
        order = sorted(some, key=self.place_of)
        batches: list[RowBatch] = []
        for _, alike in groupby(order, key=lambda each: self.place_of(each)[:2]):
            points = [self.points[each] for each in alike]
            first, rows = points[0], [point.row for point in points]
            if isinstance(first, LiveRow):
                is_whole = rows == list(range(first.batch.batch))
                if is_whole and len(rows) == len(order):
                    first.batch.model = model  # as it is now
                    return first.batch, order
                batches.append(first.batch if is_whole else first.batch.select(rows))
            else:
                batches.append(RowBatch.of(model, [first.state.select(rows)]))
        batch = batches[0] if len(batches) == 1 else RowBatch.join(batches)
        batch.model = model
        self.points |= {each: LiveRow(batch, row) for row, each in enumerate(order)}
        return batch, order

    def groups(self, order: list[int]) -> list[Group]:
        """Conversations at one position as one state each; those that share one already, and all of it, as it is."""
        by_position: dict[tuple[int, bool], list[ConversationPoint]] = {}
        places: dict[tuple[int, bool], list[int]] = {}
        for place, conversation in enumerate(order):
            point = self.keep(conversation)
            key = point.num_tokens, point.state is None
            by_position.setdefault(key, []).append(point)
            places.setdefault(key, []).append(place)
        return [Group(tuple(places[key]), joined(points)) for key, points in by_position.items()]

    def part(self) -> None:
        """Conversations that stayed behind take what is theirs of a state or batch whose other rows went on."""
        shared: dict[int, list[int]] = {}
        for conversation, (whole, _) in self.points.items():
            if whole is not None:
                shared.setdefault(id(whole), []).append(conversation)
        for conversations in shared.values():
            points: list[Any] = [self.points[each] for each in conversations]
            whole, rows = points[0][0], sorted({point.row for point in points})
            if 2 * len(rows) <= whole.batch:
                own, places = whole.select(rows), {row: place for place, row in enumerate(rows)}
                for each, point in zip(conversations, points, strict=True):
                    self.points[each] = type(point)(own, places[point.row])


def joined(points: list[ConversationPoint]) -> State | None:
    """One state of points at one position, in order."""
    first = points[0].state
    if first is None:
        return None
    if all(point.state is first for point in points) and [p.row for p in points] == list(range(first.batch)):
        return first
    parts: list[tuple[Any, list[int]]] = []
    for point in points:
        if not parts or parts[-1][0] is not point.state:
            parts.append((point.state, []))
        parts[-1][1].append(point.row)
    selected = [state.select(rows) for state, rows in parts]
    return selected[0] if len(selected) == 1 else type(first).join(selected)


__all__ = ["ConversationPoint", "ConversationPool"]
