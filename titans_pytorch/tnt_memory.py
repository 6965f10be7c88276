"""`TNTMemory`: one memory that stores a long chunk at once, beside others with short chunks that restart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.fast_weights.rules.registry import forgets
from titans_pytorch.memory.options import SpanKind
from titans_pytorch.memory.paper import DECAY_BIAS, MAX_STEP, form_options, of_token, width_of_heads
from titans_pytorch.memory.rows import Chosen, check_joinable, detached, moved, selected
from titans_pytorch.memory.state import NeuralMemState
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.pretrained import Pretrained
from titans_pytorch.public_names import register_state
from titans_pytorch.ragged import Marks, RaggedState, marks_of, read_marked

__all__ = ["TNTMemory", "TNTState"]

SET_FOR_EACH = ("dim", "heads", "chunk_size", "batch_size", "init_decay_bias", "shard", "qk_projection")


@register_state
class TNTState(NamedTuple):
    """The states of all memories of a `TNTMemory`, the global one first."""

    memories: tuple[NeuralMemState, ...]

    @property
    def batch(self) -> int:
        """The number of sequences."""
        return self.memories[0].batch

    @property
    def num_seen(self) -> int:
        """Tokens seen so far."""
        return self.memories[0].num_seen

    def detach(self) -> TNTState:
        """A state that is cut from the graph of what came before."""
        return detached(self)

    def to(self, *args: Any, **kwargs: Any) -> TNTState:
        """Move to another device or dtype; the arguments of `torch.Tensor.to`."""
        return moved(self, *args, **kwargs)

    def select(self, rows: Chosen) -> TNTState:
        """The sequences with these numbers, in this order and as often as named."""
        return selected(self, rows, self.batch)

    def repeat(self, times: int) -> TNTState:
        """Every sequence `times` times in a row: (b) -> (b times)"""
        return TNTState(tuple(each.repeat(times) for each in self.memories))

    @staticmethod
    def join(states: Sequence[TNTState]) -> TNTState:
        """One batch of the sequences of several states that have seen equally many tokens, the inverse of `select`."""
        check_joinable(TNTState, states, lambda state: state.num_seen)
        each = zip(*(state.memories for state in states), strict=True)
        return TNTState(tuple(map(NeuralMemState.join, each)))

    def at_rest(self) -> TNTState:
        """A state without what would keep the call that returned it alive."""
        return TNTState(tuple(each.at_rest() for each in self.memories))


class TNTMemory(Pretrained, nn.Module):
    """A memory in two parts (TNT, arXiv 2511.07343): a global one with long chunks, and local ones with short chunks.

        memory = TNTMemory(dim=384, heads=4, global_chunk=512, local_chunks=(8,), shard=512)
        retrieved, state = memory(torch.randn(2, 4096, 384))       # (2 4096 384)
        retrieved, state = memory(torch.randn(2, 7, 384), state)   # goes on at any token

    Local memories restart from their learned start with every shard, so whole shards are read side by side, and are
    asked with queries on their keys. What all memories say is added up (eq. 15). All have the form of the paper's
    memory (`NeuralMemory.paper`), one gate for all parameters and the mean loss. The second stage of training goes on
    with smaller local chunks: the parameters are the same.

    Args:
        dim: features of a token
        heads: of every memory, `dim / heads` wide each
        global_chunk: tokens that the global memory stores at once
        local_chunks: of each local memory, the tokens that it stores at once
        shard: tokens after which local memories restart, a multiple of their chunks
        qk_projection: on the keys of which span local queries are projected, "shard", "chunk" or None: they are not
        token_gates: momentum and forgetting of every token; gradients are those at the start of its chunk
        decay_bias: what the logit of forgetting in a chunk starts with
        options: further arguments of `NeuralMemory`, for all of them
    """

    def __init__(
        self,
        dim: int,
        heads: int = 1,
        *,
        global_chunk: int = 512,
        local_chunks: Sequence[int] = (8,),
        shard: int = 512,
        qk_projection: SpanKind | None = "shard",
        token_gates: bool = False,
        decay_bias: float = DECAY_BIAS,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        local_chunks = value_checks.check_sizes("local_chunks", local_chunks)
        value_checks.check_whole(global_chunk=global_chunk, shard=shard)
        value_checks.check_switches(token_gates=token_gates)
        value_checks.check_number(decay_bias=decay_bias)
        given = value_checks.check_reserved("options", options, SET_FOR_EACH, "TNTMemory")
        width = width_of_heads(dim, heads, given.get("dim_head"))
        shared = form_options(dim, heads, dim_head=width, default_step_transform_max_lr=MAX_STEP) | given

        rule = given.get("rule", "titans")
        rule_forgets = isinstance(rule, str) and forgets(rule)

        def made(chunk: int, **of_shards: Any) -> NeuralMemory:
            gate_chunk, bias = (1, of_token(decay_bias, chunk)) if token_gates else (chunk, decay_bias)
            steps: dict[str, Any] = dict(chunk_size=gate_chunk, batch_size=chunk)
            if rule_forgets:
                steps |= dict(init_decay_bias=bias)
            return NeuralMemory(**shared | steps | of_shards)

        self.global_memory = made(global_chunk)
        self.local_memories = nn.ModuleList(
            made(chunk, shard=shard, qk_projection=qk_projection) for chunk in local_chunks
        )
        self.init_as_association()

    @property
    def memories(self) -> list[NeuralMemory]:
        """All of them, the global one first."""
        return [self.global_memory, *cast(Any, self.local_memories)]

    def init_as_association(self) -> None:
        """Begin as memories of what followed what."""
        for memory in self.memories:
            memory.init_as_association()

    def init_state(self, batch: int) -> TNTState:
        """Memories that have seen nothing."""
        return TNTState(tuple(memory.init_state(batch) for memory in self.memories))

    def reset(self, state: TNTState, rows: Tensor | None = None) -> TNTState:
        """Let some sequences of a batch forget everything; rows: (b) bool, None: all."""
        self.check_state(state)
        each = zip(self.memories, state.memories, strict=True)
        return TNTState(tuple(memory.reset(of_memory, rows) for memory, of_memory in each))

    def forward(
        self,
        seq: Tensor,
        state: TNTState | RaggedState | None = None,
        store_mask: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, TNTState | RaggedState]:
        """Store a piece of a sequence in all memories and read them at each of its tokens.

        Args:
            seq: (b n dim), or one token (b dim)
            state: what the call before returned; None: nothing has been seen
            store_mask: (b n) bool, False for tokens that leave no trace in the memories
            attention_mask: (b n), False or 0 for padding, which is not even read; outputs there are 0
            document_ids: (b n), another document begins where the number changes, and is read as if it were alone
            cu_seqlens: (k + 1), the borders between documents of a single row, from 0 to n

        Returns: what was read (b n dim), and the state (a `RaggedState` where rows differ in length)
        """
        tensor_checks.check_sequence("seq", seq, views=None, dim=self.global_memory.dim, dtype=self.global_memory.dtype)
        seq = seq.unsqueeze(1) if seq.ndim == 2 else seq
        marks = marks_of(attention_mask, document_ids, cu_seqlens, seq.shape[:2])
        if marks is None and not isinstance(state, RaggedState):
            return self.read(seq, state, store_mask)
        if store_mask is not None:
            raise ValueError("store_mask is of rows at one position, got it with padding, documents or a RaggedState")
        return read_marked(self.read, seq, marks or Marks(None, None), state)

    def read(
        self, seq: Tensor, state: TNTState | None = None, store_mask: Tensor | None = None
    ) -> tuple[Tensor, TNTState]:
        """The sum of what all memories say.  seq: (b n dim) -> (b n dim), the next state"""
        if state is not None:
            self.check_state(state)
        memories = self.memories
        before = [None] * len(memories) if state is None else state.memories
        reads, states = zip(
            *(memory(seq, state=each, store_mask=store_mask) for memory, each in zip(memories, before, strict=True)),
            strict=True,
        )
        return torch.stack(reads).sum(dim=0), TNTState(states)  # eq. (15)

    def check_state(self, state: TNTState) -> None:
        """A state of as many memories."""
        if not isinstance(state, TNTState):
            raise TypeError(f"state must be a TNTState, got {type(state).__name__}")
        if len(state.memories) != (num := len(self.memories)):
            raise ValueError(f"state must be of {num} memories, got one of {len(state.memories)}")
