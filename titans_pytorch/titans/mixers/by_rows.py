"""The mixers of the family, one token for each of many rows at positions of their own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, NamedTuple, TypeVar, cast

from torch import Tensor

from titans_pytorch.attention.key_values import KeyValues
from titans_pytorch.attention.rotary import Turns, turned
from titans_pytorch.decoding.due import Cadence, TokenStep
from titans_pytorch.decoding.memory import MemoryByRows, MemoryRows
from titans_pytorch.decoding.window import WindowRows, attend_rows, window_rows
from titans_pytorch.fast_weights.interface import Weights
from titans_pytorch.memory.state import NeuralMemState, QueryTail, ReadingGroup
from titans_pytorch.titans.mixers.lmm import LMMState, MemoryAlone
from titans_pytorch.titans.mixers.mac import MACState, MemoryAsContext, Segment
from titans_pytorch.titans.mixers.mag import MAGState, MemoryAsGate
from titans_pytorch.titans.mixers.mal import MALState, MemoryAsLayer
from titans_pytorch.titans.mixers.mixer import AttentionMixer, Mixer

Kind = TypeVar("Kind", bound=Mixer)


class MixerRows(NamedTuple):
    """What a mixer keeps of every row, in place."""

    memory: MemoryRows | None
    window: WindowRows | None
    before: Weights  # (b h ...)  the memory before a row's segment; empty without segments
    tail: Tensor | None  # (b size-1 channels)  what asking that memory goes on with


class MixerByRows(ABC, Generic[Kind]):
    """A mixer that is given one token of each row."""

    def __init__(self, mixer: Kind, cadence: Cadence) -> None:
        self.mixer, self.cadence = mixer, cadence
        memory: Any = mixer.memory
        self.memory = None if memory is None else MemoryByRows(memory)

    def enter(self, state: Any, position: int, batch: int) -> MixerRows:
        """The rows of a state of sequences that have read so many tokens, as copies."""
        window = None
        if isinstance(self.mixer, AttentionMixer):
            recent = state.recent or no_token(self.mixer, batch)
            window = window_rows(self.cadence, position, state.prefix, recent)
        return MixerRows(self.entered(state.memory), window, {}, None)

    def entered(self, state: NeuralMemState | None) -> MemoryRows | None:
        """The memories of a state."""
        return None if self.memory is None or state is None else self.memory.enter(state)

    def leave(self, rows: MixerRows, row: int, position: int) -> Any:
        """The state of a row that has read so many tokens, as a copy."""
        memory, window = self.left(rows, row, position), cast(WindowRows, rows.window)
        num = self.cadence.num_persistent
        recent = window.read(row, self.cadence.slots(position), num)
        return self.mixer.State(memory, prefix_of(window, row, num), recent)

    def left(self, rows: MixerRows, row: int, position: int) -> NeuralMemState | None:
        """The state of a row's memory."""
        if self.memory is None or rows.memory is None:
            return None
        return self.memory.leave(rows.memory, row, position + self.cadence.num_stored_before)

    @abstractmethod
    def advance(self, x: Tensor, rows: MixerRows, step: TokenStep) -> Tensor:
        """The next token of every row, normed.  x: (b 1 dim) -> same"""

    def remember(self, x: Tensor, rows: MixerRows, step: TokenStep) -> Tensor | None:
        """What the memory says of the token, after it was stored; None without one."""
        if self.memory is None or rows.memory is None:
            return None
        return self.memory.advance(x, rows.memory, step)

    def slide(self, x: Tensor, rows: MixerRows, step: TokenStep) -> Tensor:
        """`AttentionMixer.slide`: persistent tokens are seen without a position (eqs. 27, 31)."""
        attention, window = cast(AttentionMixer, self.mixer).attention, cast(WindowRows, rows.window)
        turns, num = cast(Turns, step.turns), self.cadence.num_persistent
        window.write(attention.keys_values(x, turns), step, num)
        q = attention.queries(x)
        return attention.out(attend_rows(window, turned(q, *turns), q, num, step))


class GateByRows(MixerByRows[MemoryAsGate]):
    """`MemoryAsGate`: attention and memory side by side."""

    def advance(self, x: Tensor, rows: MixerRows, step: TokenStep) -> Tensor:
        y = self.slide(x, rows, step)  # eq. (27)
        read, gate = self.remember(x, rows, step), self.mixer.gate
        return y if read is None or gate is None else gate(y, read)  # eq. (28)


class LayerByRows(MixerByRows[MemoryAsLayer]):
    """`MemoryAsLayer`: attention over what the memory says."""

    def advance(self, x: Tensor, rows: MixerRows, step: TokenStep) -> Tensor:
        read = self.remember(x, rows, step)  # eq. (30)
        y = x if read is None else read
        o = self.slide(self.mixer.normed(y, x), rows, step)  # eq. (31)
        return y + o if self.mixer.keeps_input else o


class AloneByRows(MixerByRows[MemoryAlone]):
    """`MemoryAlone`: no attention."""

    def leave(self, rows: MixerRows, row: int, position: int) -> LMMState:
        return LMMState(self.left(rows, row, position))

    def advance(self, x: Tensor, rows: MixerRows, step: TokenStep) -> Tensor:
        read = self.remember(x, rows, step)  # eqs. (13-15)
        return x.new_zeros(x.shape) if read is None else read


class ContextByRows(MixerByRows[MemoryAsContext]):
    """`MemoryAsContext`: attention inside segments, over what the memory knew before the segment."""

    @property
    def first(self) -> int:
        """Where persistent tokens begin: behind what was read for the segment's tokens."""
        return 0 if self.memory is None else self.cadence.window

    def enter(self, state: MACState, position: int, batch: int) -> MixerRows:
        if self.memory is None or state.segment is None:
            return super().enter(state, position, batch)
        context, before, tail = state.segment
        nothing = no_token(self.mixer, batch)  # so far, where a segment begins
        window = window_rows(self.cadence, position, context or nothing, state.prefix, state.recent or nothing)
        kept = None if tail is None or tail.convolution is None else tail.convolution.clone()
        of_rows = {name: self.memory.each(weight).clone() for name, weight in before.items()}
        return MixerRows(self.entered(state.memory), window, of_rows, kept)

    def leave(self, rows: MixerRows, row: int, position: int) -> MACState:
        window, first, num = cast(WindowRows, rows.window), self.first, self.cadence.num_persistent
        slots, memory = self.cadence.slots(position), self.left(rows, row, position)
        recent = window.read(row, slots, first + num) if slots else None
        prefix = prefix_of(window, row, num, first)
        if memory is None:
            return MACState(None, prefix, recent)
        before = {name: weight[row].clone() for name, weight in rows.before.items()}
        convolution = None if rows.tail is None else rows.tail[row : row + 1].clone()
        context = window.read(row, slots) if slots else None
        segment = Segment(context, before, QueryTail(position, convolution, ReadingGroup(None, None)))
        return MACState(memory, prefix, recent, segment)

    def advance(self, x: Tensor, rows: MixerRows, step: TokenStep) -> Tensor:
        mixer, attention, window = self.mixer, self.mixer.attention, cast(WindowRows, rows.window)
        turns, memory = cast(Turns, step.turns), self.memory
        window.write(attention.keys_values(x, turns), step, self.first + self.cadence.num_persistent)
        if memory is not None:
            h = memory.ask(x, rows.before, rows.tail)  # eq. (21)
            window.write(attention.keys_values(mixer.context_norm(h), step.read_turns), step, 0)
        placed = turned(attention.queries(x), *turns)
        y = attention.out(attend_rows(window, placed, placed, 0, step))  # eqs. (22, 23)
        if memory is None or rows.memory is None or mixer.gate is None:
            return y
        y = y.to(x.dtype)  # half precision under autocast
        y = x + y if mixer.keeps_input else y
        output: Tensor = mixer.gate(y, memory.advance(y, rows.memory, step))  # eqs. (24, 25)
        if step.segments is not None:
            for name, weight in rows.before.items():
                weight.index_copy_(0, step.segments, rows.memory.current[name][step.segments])
        return output


def no_token(mixer: AttentionMixer, batch: int) -> KeyValues:
    """Keys and values of no token."""
    weight = mixer.attention.to_queries.weight
    return mixer.attention.keys_values(weight.new_zeros(batch, 0, weight.shape[1]), None)


def prefix_of(window: WindowRows, row: int, num: int, first: int = 0) -> KeyValues | None:
    """Keys and values of the persistent tokens; None: there are none."""
    return window.read(row, list(range(num)), first) if num else None


ROWS: dict[type[Mixer], type[MixerByRows[Any]]] = {
    MemoryAsContext: ContextByRows,
    MemoryAsGate: GateByRows,
    MemoryAsLayer: LayerByRows,
    MemoryAlone: AloneByRows,
}
"""How each mixer of the family is run by rows"""

__all__ = ["ROWS", "MAGState", "MALState", "MixerByRows", "MixerRows"]
