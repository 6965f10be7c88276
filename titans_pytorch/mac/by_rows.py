"""The transformer, one token for each of many rows at positions of their own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from titans_pytorch.attention.key_values import KeyValueCache
from titans_pytorch.attention.rotary import Turns
from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.decoding import Cadence, RowModel, TokenStep, have_hooks
from titans_pytorch.decoding.memory import MemoryByRows, MemoryRows, fits_rows, why_not_memory_by_rows
from titans_pytorch.decoding.window import WindowRows, attend_rows, window_rows
from titans_pytorch.mac.ahead import NOTHING_AHEAD, LayerAhead, connections_ahead
from titans_pytorch.mac.axial import AxialPositions
from titans_pytorch.mac.cache import LayerCache, MACCache
from titans_pytorch.mac.layer import MACLayer
from titans_pytorch.mac.residual_streams import expand, open_branch
from titans_pytorch.mac.stack import Stack
from titans_pytorch.memory.rows import joined, write_rows


class LayerRows(NamedTuple):
    """What a layer keeps of every row, in place."""

    window: WindowRows
    memory: MemoryRows | None


class MACLayerByRows:
    """A layer that is given one token of each row."""

    def __init__(self, layer: MACLayer, cadence: Cadence) -> None:
        self.layer, self.cadence = layer, cadence
        self.memory = None if layer.memory is None else MemoryByRows(layer.memory)

    def enter(self, cache: LayerCache) -> LayerRows:
        """The rows of what the layer keeps of sequences, as copies."""
        attention, window = self.layer.attention, cache.attention.key_values
        prefix = attention.prefix(window)
        prefix = None if prefix is None else prefix.map(lambda x: x.expand(len(window.keys), -1, -1, -1))
        memory = None if self.memory is None or cache.memory is None else self.memory.enter(cache.memory)
        return LayerRows(window_rows(self.cadence, cache.attention.num_seen, prefix, window), memory)

    def leave(self, rows: LayerRows, row: int, place: int) -> LayerCache:
        """What the layer keeps of a row that has come to a place, as a copy."""
        memory = None
        if self.memory is not None and rows.memory is not None:
            memory = self.memory.leave(rows.memory, row, place)
        window = rows.window.read(row, self.cadence.slots(place), self.cadence.num_persistent)
        return LayerCache(KeyValueCache(*window, place), memory)

    def advance(
        self, streams: Tensor, values: Tensor | None, rows: LayerRows, step: TokenStep, ahead: LayerAhead
    ) -> tuple[Tensor, Tensor]:
        """`MACLayer` for the next token of every row.  streams: (b 1 s d), values: (b h 1 d) of the first attention"""
        layer, gates = self.layer, None
        if self.memory is not None and rows.memory is not None:
            branch = open_branch(layer.memory_connection, streams, ahead.memory_connection)
            streams, gates = layer.placed(branch, self.memory.advance(branch.input, rows.memory, step))
        branch = open_branch(layer.attention_connection, streams, ahead.attention_connection)
        q, tokens, own_values = layer.attention.projected(branch.input, values, cast(Turns, step.turns))
        rows.window.write_prefix(layer.attention.prefix(tokens))  # as parameters are now
        rows.window.write(tokens, step, self.cadence.num_persistent)
        attended = layer.attention.answer(attend_rows(rows.window, q, q, 0, step), gates)
        streams = branch.add(attended)
        branch = open_branch(layer.ff_connection, streams, ahead.ff_connection)
        return branch.add(layer.ff(branch.input)), own_values if values is None else values


class KnownPositions:
    """Embedded positions, while parameters do not change: only where a row of positions begins something is new."""

    def __init__(self, positions: AxialPositions) -> None:
        self.positions, self.columns = positions, positions.factors(0)[1]  # (width dim)
        self.known: dict[int, Tensor] = {}  # (dim)  of rows of positions, by number

    def at(self, places: Sequence[int], on_device: Tensor) -> Tensor:
        """places, which a tensor on the device has as well: (b) -> (b dim)"""
        numbers = [place // self.positions.width for place in places]
        if not self.known.keys() >= set(numbers):
            wanted = sorted(set(numbers))
            embedded = self.positions.embed(0, torch.tensor(wanted, device=on_device.device))
            self.known = dict(zip(wanted, embedded, strict=True))
        row_of = torch.stack([self.known[number] for number in numbers])
        return row_of + self.columns[on_device % self.positions.width]


class MACByRows(RowModel):
    """A `MemoryAsContextTransformer` that reads one token of every row, wherever each of them is."""

    def __init__(self, stack: Stack, token_emb: nn.Module, to_logits: nn.Module, compiles: bool = False) -> None:
        self.stack, self.token_emb, self.to_logits, self.compiles = stack, token_emb, to_logits, compiles
        self.cadence = cadence_of(stack)
        self.layers = [MACLayerByRows(layer, self.cadence) for layer in stack.layers]
        self.rotary = stack.layers[0].attention.rotary_emb
        self.connections = [NOTHING_AHEAD] * len(self.layers)
        self.known_positions: KnownPositions | None = None

    @torch.no_grad()
    def prepared(self) -> MACByRows:
        found = MACByRows(self.stack, self.token_emb, self.to_logits, self.compiles)
        found.connections = [connections_ahead(layer) for layer in self.stack.layers]
        found.known_positions = KnownPositions(self.stack.positions)
        return found

    def fits(self, state: Any) -> bool:
        if not isinstance(state, MACCache):
            return False
        place = self.stack.lengthened.length(state.num_tokens)
        return state.num_tokens > 0 and all(fits_rows(memory, place) for memory in state.memories)

    def enter(self, state: MACCache) -> tuple[LayerRows, ...]:
        self.stack.check_cache(state, state.batch)
        return self.entered(state.layers(self.stack.have_memory))

    def entered(self, caches: Iterable[LayerCache]) -> tuple[LayerRows, ...]:
        """The rows of what all layers keep."""
        return tuple(by_rows.enter(cache) for by_rows, cache in zip(self.layers, caches, strict=True))

    def leave(self, buffers: tuple[LayerRows, ...], row: int, position: int) -> MACCache:
        return MACCache.of(position, self.left(buffers, row, position))

    def left(self, buffers: tuple[LayerRows, ...], row: int, position: int) -> list[LayerCache]:
        """What all layers keep of a row."""
        place = self.stack.lengthened.length(position)
        return [by_rows.leave(rows, row, place) for by_rows, rows in zip(self.layers, buffers, strict=True)]

    def read_between(self, buffers: tuple[LayerRows, ...], positions: Sequence[int]) -> None:
        """Long-term tokens, which rows that begin a segment read before its first token."""
        segment_len, num_longterm = self.stack.lengthened
        if num_longterm == 0:
            return
        for position in sorted({each for each in positions if each % segment_len == 0}):
            rows = [row for row, each in enumerate(positions) if each == position]
            befores = joined([tuple(self.left(buffers, row, position)) for row in rows])
            x = self.stack.longterm.expand(len(rows), -1, -1)
            _, after = self.stack.through_layers(x, self.stack.lengthened.length(position), befores)
            write_rows(buffers, rows, self.entered(after), len(positions))

    def step(self, positions: Sequence[int]) -> TokenStep:
        places = [self.stack.lengthened.length(position + 1) - 1 for position in positions]
        step = TokenStep.of(self.cadence, places, self.rotary, self.stack.longterm)
        known = self.known_positions
        embedded = self.stack.positions.at(step.positions) if known is None else known.at(places, step.positions)
        return step._replace(embedded=embedded[:, None])

    def hidden(self, x: Tensor, buffers: tuple[LayerRows, ...], step: TokenStep) -> Tensor:
        streams, values = expand(self.stack.expand_streams, x + cast(Tensor, step.embedded)), None
        for by_rows, rows, ahead in zip(self.layers, buffers, self.connections, strict=True):
            streams, values = by_rows.advance(streams, values, rows, step, ahead)
        normed: Tensor = self.stack.norm(streams.sum(dim=2))
        return normed

    def logits(self, ids: Tensor, buffers: tuple[LayerRows, ...], step: TokenStep) -> Tensor:
        logits: Tensor = self.to_logits(self.hidden(self.token_emb(ids[:, None]), buffers, step))
        return logits[:, 0]


def cadence_of(stack: Stack) -> Cadence:
    """How the transformer cuts time, in places of the lengthened sequence."""
    attention: SegmentedAttention = stack.layers[0].attention
    layout = next((layer.memory.layout for layer in stack.layers if layer.memory is not None), None)
    return Cadence(
        window=attention.window + 1 if attention.sliding else attention.window,  # its own token and those before
        is_segmented=not attention.sliding,
        has_context=False,
        num_persistent=attention.persistent_memory.shape[2],
        num_stored_before=0,
        chunk=None if layout is None else layout.store_chunk,
        refresh=None if layout is None else layout.batch,
    )


def why_not_stack_by_rows(stack: Stack) -> str:
    """What keeps a transformer from being decoded by rows, as the end of a sentence; empty: nothing does."""
    if type(stack.positions) is not AxialPositions:
        return "embeds positions in a way of its own"
    chunks: set[Any] = set()
    for layer in stack.layers:
        if type(layer) is not MACLayer:
            return "has layers that were replaced"
        if type(layer.attention) is not SegmentedAttention or layer.attention.scale is not None:
            return "has attention of another kind"
        if have_hooks(stack.positions, layer, layer.attention, layer.memory):
            return "has hooks around its layers, which would not be called"
        if layer.memory is not None:
            if why := why_not_memory_by_rows(layer.memory):
                return why
            chunks.add((layer.memory.layout.store_chunk, layer.memory.layout.batch))
    return "has memories with chunks of their own" if len(chunks) > 1 else ""
