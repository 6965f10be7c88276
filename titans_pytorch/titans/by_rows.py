"""The language models of the family, one token for each of many rows at positions of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from titans_pytorch.decoding import Cadence, RowModel, TokenStep, have_hooks
from titans_pytorch.decoding.memory import fits_rows, why_not_memory_by_rows
from titans_pytorch.titans.backbone import TitansBackbone, TitansBlock
from titans_pytorch.titans.mixers.by_rows import ROWS, MixerByRows, MixerRows
from titans_pytorch.titans.mixers.mac import MemoryAsContext
from titans_pytorch.titans.mixers.mixer import AttentionMixer
from titans_pytorch.titans.state import TitansState

Buffers = tuple[MixerRows, ...]
"""What each block keeps of every row"""


class TitansByRows(RowModel):
    """A model of the family that reads one token of every row, wherever each of them is."""

    def __init__(
        self,
        backbone: TitansBackbone,
        token_emb: nn.Module,
        logits: Callable[[Tensor], Tensor],
        compiles: bool = False,
    ) -> None:
        self.backbone, self.token_emb, self.to_logits, self.compiles = backbone, token_emb, logits, compiles
        self.cadence = cadence_of(backbone)
        self.mixers: list[MixerByRows[Any]] = [
            ROWS[type(block.mixer)](block.mixer, self.cadence) for block in blocks_of(backbone)
        ]
        attentions = [mixer.mixer.attention for mixer in self.mixers if isinstance(mixer.mixer, AttentionMixer)]
        self.rotary = attentions[0].rotary_emb if attentions else None

    def fits(self, state: Any) -> bool:
        if not isinstance(state, TitansState):
            return False
        num_seen = state.num_tokens + self.cadence.num_stored_before
        memories = [layer.memory for layer in state.layers if layer.memory is not None]
        return state.num_tokens > 0 and all(fits_rows(memory, num_seen) for memory in memories)

    def enter(self, state: TitansState) -> Buffers:
        self.backbone.check_state(state, state.batch)
        return tuple(
            by_rows.enter(by_rows.mixer.own_state(layer), state.num_tokens, state.batch)
            for by_rows, layer in zip(self.mixers, state.layers, strict=True)
        )

    def leave(self, buffers: Buffers, row: int, position: int) -> TitansState:
        layers = (by_rows.leave(rows, row, position) for by_rows, rows in zip(self.mixers, buffers, strict=True))
        return TitansState(position, 1, tuple(layers))

    def read_between(self, buffers: Buffers, positions: Sequence[int]) -> None:
        """Nothing: persistent tokens stand before the first."""

    def step(self, positions: Sequence[int]) -> TokenStep:
        return TokenStep.of(self.cadence, positions, self.rotary, self.backbone.norm.weight)

    def hidden(self, x: Tensor, buffers: Buffers, step: TokenStep) -> Tensor:
        for block, by_rows, rows in zip(blocks_of(self.backbone), self.mixers, buffers, strict=True):
            x = x + by_rows.advance(block.mixer_norm(x), rows, step)
            x = x + block.ff(block.ff_norm(x))
        return self.backbone.norm(x)

    def logits(self, ids: Tensor, buffers: Buffers, step: TokenStep) -> Tensor:
        return self.to_logits(self.hidden(self.token_emb(ids[:, None]), buffers, step))[:, 0]


def cadence_of(backbone: TitansBackbone) -> Cadence:
    """How a model cuts time."""
    config = backbone.config
    is_segmented = any(isinstance(block.mixer, MemoryAsContext) for block in blocks_of(backbone))
    return Cadence(
        window=config.window,
        is_segmented=is_segmented,
        has_context=is_segmented,
        num_persistent=config.num_persistent,
        num_stored_before=0 if is_segmented else config.num_persistent,  # in segments attention alone sees them
        chunk=config.gate_chunk,
        refresh=config.memory_refresh,
    )


def blocks_of(backbone: TitansBackbone) -> list[TitansBlock]:
    """The blocks, as what they are."""
    return [block for block in backbone.blocks if isinstance(block, TitansBlock)]


def why_not_by_rows(backbone: TitansBackbone) -> str:
    """What keeps a model from being decoded by rows, as the end of a sentence; empty: nothing does."""
    blocks = blocks_of(backbone)
    if len(blocks) < len(backbone.blocks):
        return "has blocks that were replaced"
    for block in blocks:
        mixer = block.mixer
        if type(mixer) not in ROWS:
            return f"has a mixer of another kind, {type(mixer).__name__}"
        if have_hooks(block, mixer, mixer.memory):
            return "has hooks around its blocks, which would not be called"
        if mixer.memory is not None and (why := why_not_memory_by_rows(mixer.memory)):
            return why
    return ""
