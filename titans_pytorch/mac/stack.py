"""What the transformer is between embedded tokens and logits: long-term tokens, positions, and layer after layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from titans_pytorch.checks import tensor_checks
from titans_pytorch.layers.calling import Call, plainly
from titans_pytorch.mac.ahead import NOTHING_AHEAD, Ahead, LayerAhead
from titans_pytorch.mac.axial import AxialPositions, Factors
from titans_pytorch.mac.cache import LayerCache, MACCache
from titans_pytorch.mac.layer import Passed
from titans_pytorch.mac.lengthened import Lengthened
from titans_pytorch.mac.residual_streams import expand


class Stack(NamedTuple):
    """The parts of a transformer that every way to read tokens goes through."""

    lengthened: Lengthened
    longterm: Tensor  # (m dim)  tokens that are inserted
    positions: AxialPositions
    expand_streams: nn.Module
    layers: Sequence[Any]  # MACLayer
    norm: nn.Module
    gives_views: bool  # memories are given mixes of what earlier layers saw

    def read(self, x: Tensor, state: MACCache | None, **how: Any) -> tuple[Tensor, MACCache]:
        """The next tokens of a sequence, embedded.  x: (b n dim) -> same, before the norm, and the state after them

        how: as of `through_layers`
        """
        num_before, count = 0 if state is None else state.num_tokens, x.shape[1]
        x = self.lengthened.insert(x, self.longterm, num_before)
        befores = [None] * len(self.layers) if state is None else state.layers(self.have_memory)
        hidden, kept = self.through_layers(x, self.lengthened.length(num_before), befores, **how)
        return self.lengthened.drop(hidden, num_before, count), MACCache.of(num_before + count, kept)

    def through_layers(
        self,
        x: Tensor,
        place: int,
        befores: Sequence[LayerCache | None],
        *,
        disable_flex_attn: bool = False,
        factors: Factors | None = None,
        ahead: Ahead | None = None,
        call: Call = plainly,
    ) -> tuple[Tensor, list[LayerCache]]:
        """Tokens as they lie in the lengthened sequence.  x: (b n' dim) -> same, and what layers keep of them

        place: of the first of them; befores: what layers kept of the tokens before; factors: of positions, computed
        before; ahead: what was worked out before for all tokens that follow; call: how a layer is called
        """
        streams, of_layers = self.begun(x, place, factors, ahead)
        passed = Passed(seen=() if self.gives_views else None)
        kept: list[LayerCache] = []
        for layer, before, part in zip(self.layers, befores, of_layers, strict=True):
            streams, passed, after = call(layer, streams, passed, before, disable_flex_attn, part)
            kept.append(after)
        return streams.sum(dim=2), kept

    def begun(
        self, x: Tensor, place: int, factors: Factors | None, ahead: Ahead | None
    ) -> tuple[Tensor, Sequence[LayerAhead]]:
        """What the first layer sees of tokens, (b n' dim) -> (b n' s dim), and every layer's part of what is known."""
        if ahead is None:
            embedded, of_layers = self.positions(place, x.shape[1], factors), [NOTHING_AHEAD] * len(self.layers)
        else:
            embedded, of_layers = ahead.at(place, x.shape[1])
        return expand(self.expand_streams, x + embedded), of_layers

    def check_cache(self, cache: MACCache, batch: int) -> None:
        """Refuse a cache of another model or another number of sequences."""
        if not isinstance(cache, MACCache):
            raise TypeError(f"cache must be a MACCache, got {type(cache).__name__}")
        wanted = (len(self.layers), sum(self.have_memory))
        if (got := (len(cache.windows), len(cache.memories))) != wanted:
            raise ValueError(
                f"cache must be of this model's {wanted[0]} layers, {wanted[1]} of them with a memory, got one of "
                f"{got[0]} layers, {got[1]} with a memory"
            )
        tensor_checks.check_batch("cache", cache.batch, batch)
        position = self.lengthened.length(cache.num_tokens)
        for number, window in enumerate(cache.windows, start=1):
            if window.num_seen != position:
                raise ValueError(
                    f"cache must be of this model at position {position}, layer {number} is at {window.num_seen}"
                )

    @property
    def have_memory(self) -> list[bool]:
        """Which layers have a memory."""
        return [layer.memory is not None for layer in self.layers]
