"""The residual network around a mixer: RMSNorm, mixer, RMSNorm, SwiGLU in every block."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from titans_pytorch.checks import tensor_checks, value_checks
from titans_pytorch.layers.calling import Call, plainly
from titans_pytorch.layers.feed_forward import SwiGLU
from titans_pytorch.layers.norm import RMSNorm
from titans_pytorch.pretrained import Pretrained
from titans_pytorch.ragged import Marks, RaggedState, marks_of, read_marked, read_without_state
from titans_pytorch.titans.config import TitansConfig
from titans_pytorch.titans.mixers import MIXERS
from titans_pytorch.titans.state import TitansState, parts_of, resting


class TitansBlock(nn.Module):
    """A mixer and a feed-forward network, each with a norm before it and a residual connection around it."""

    def __init__(self, variant: str, config: TitansConfig) -> None:
        super().__init__()
        self.mixer = MIXERS[variant](config)
        self.mixer_norm = nn.Identity() if self.mixer.is_idle else RMSNorm(config.dim)
        self.ff_norm, self.ff = RMSNorm(config.dim), SwiGLU(config.dim, config.hidden)

    def forward(self, x: Tensor, start: int, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.mixer_norm(x), start, self.mixer.own_state(state))
        x = x + mixed
        return x + self.ff(self.ff_norm(x)), state


class Read(NamedTuple):
    """What a model answers to a piece of a sequence."""

    outputs: Tensor  # (b n ...)
    state: Any  # a TitansState, or a RaggedState where rows differ in length


class TitansBackbone(Pretrained, nn.Module):
    """Titans over continuous inputs: signals, time series, the features of somebody's own network.

        backbone = TitansBackbone("mag", TitansConfig(dim=64, depth=2))
        outputs, state = backbone(torch.randn(2, 1000, 64))             # (2 1000 64)
        more, state = backbone(torch.randn(2, 7, 64), state)            # goes on at any token

    Args:
        variant: mac, mag, mal or lmm: the memory as context, as gate, as layer, or alone; or a name of `register_mixer`
        config: what the blocks are made of
    """

    def __init__(self, variant: str, config: TitansConfig) -> None:
        super().__init__()
        value_checks.check_choice("variant", variant, tuple(MIXERS))
        if not isinstance(config, TitansConfig):
            raise TypeError(f"config must be a TitansConfig, got {type(config).__name__}")
        self.variant, self.config = variant, config
        blocks = [TitansBlock(variant, config.of_block(number)) for number in range(1, config.depth + 1)]
        self.blocks, self.parts = nn.ModuleList(blocks), [block.mixer.parts for block in blocks]
        self.norm = RMSNorm(config.dim)

    def forward(
        self,
        x: Tensor,
        state: TitansState | RaggedState | None = None,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Read:
        """The next tokens of sequences.  x: (b n dim) -> (b n dim), normed, and what the next piece needs

        attention_mask: (b n), False or 0 for padding, which leaves no trace, and where outputs are 0;
        document_ids: (b n), another document begins where the number changes; cu_seqlens: (k + 1), the same of a
        single row, as borders
        """
        tensor_checks.check_tokens("x", x, dim=self.config.dim, dtype=self.norm.weight.dtype)
        marks = marks_of(attention_mask, document_ids, cu_seqlens, x.shape[:2])
        if marks is None and not isinstance(state, RaggedState):
            return Read(*self.read(x, state))
        return Read(*read_marked(self.read, x, marks or Marks(None, None), state))

    def outputs(
        self,
        x: Tensor,
        state: TitansState | RaggedState | None = None,
        *,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """The outputs of `forward` alone: with padding, rows of different lengths are read in one call."""
        tensor_checks.check_tokens("x", x, dim=self.config.dim, dtype=self.norm.weight.dtype)
        marks = marks_of(attention_mask, document_ids, cu_seqlens, x.shape[:2])
        return read_without_state(self.read, x, marks, state)

    def read(self, x: Tensor, state: TitansState | None = None, *, call: Call = plainly) -> tuple[Tensor, TitansState]:
        """The next tokens of sequences at one position.  x: (b n dim) -> (b n dim), normed, and the next state

        Args:
            x: (b n dim)
            state: of the tokens before; None: sequences begin
            call: how a block is called, (block, *arguments) -> (b n dim) and its state: through
                `torch.utils.checkpoint`, say, or noting what comes out
        """
        tensor_checks.check_tokens("x", x, dim=self.config.dim, dtype=self.norm.weight.dtype)
        start = 0
        if state is not None:
            self.check_state(state, x.shape[0])
            start = state.num_tokens
        layers = []
        for number, block in enumerate(self.blocks):
            x, layer = call(block, x, start, None if state is None else state.layers[number])
            layer = resting(layer)  # or the next block would run beside what only the call before held
            layers.append(layer)
        return self.norm(x), TitansState(start + x.shape[1], x.shape[0], tuple(layers))

    def check_state(self, state: TitansState, batch: int) -> None:
        """Refuse a state of another kind of model or of another number of sequences."""
        if not isinstance(state, TitansState):
            raise TypeError(f"state must be a TitansState, got {type(state).__name__}")
        tensor_checks.check_batch("state", state.batch, batch)
        if len(state.layers) != len(self.blocks):
            raise ValueError(f"state must be of this model's {len(self.blocks)} blocks, got {len(state.layers)}")
        for number, (layer, parts) in enumerate(zip(state.layers, self.parts, strict=True), start=1):
            if (got := parts_of(layer)) != parts:
                expected, found = (", ".join(sorted(each)) or "nothing" for each in (parts, got))
                raise ValueError(
                    f"state must be of a model like this one, with {expected} in block {number}, got one with {found}"
                )
