"""Token ids or embeddings to features: the library's layers, with what transformers asks of a model around them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils.generic import can_return_tuple

from titans_pytorch.decoding import RowModel
from titans_pytorch.hf.cache import Fed, TitansCache
from titans_pytorch.hf.config import LibraryConfig, MACTransformerConfig, TitansModelConfig
from titans_pytorch.hf.documents import marks_of_call
from titans_pytorch.hf.pretrained_model import TitansPreTrainedModel
from titans_pytorch.mac.by_rows import MACByRows, why_not_stack_by_rows
from titans_pytorch.mac_transformer import MACCache, MemoryAsContextTransformer
from titans_pytorch.ragged import read_without_state
from titans_pytorch.titans.backbone import TitansBackbone
from titans_pytorch.titans.by_rows import TitansByRows, why_not_by_rows
from titans_pytorch.titans.state import TitansState


class StreamingModel(TitansPreTrainedModel):
    """Both families: a subclass makes the layers and says how they read a piece of sequences of one length."""

    embed_tokens: nn.Embedding
    gradient_checkpointing = False

    def __init__(self, config: LibraryConfig) -> None:
        super().__init__(config)
        # First among the parts, as peft takes the first parameter of a vocabulary's size for the embedding; what it is
        # in the end is drawn when the library's models draw it.
        self.embed_tokens = nn.Identity()  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def read(self, x: Tensor, state: Any, *, notes_layers: bool) -> tuple[Tensor, Any]:
        """The next tokens of sequences.  x: (b n dim) -> normed features (b n 1 dim), and the state after them

        notes_layers: before the features, also what each layer is given, (b n layers+1 dim)
        """
        raise NotImplementedError

    def by_rows(self) -> RowModel | None:
        """What decodes rows at positions of their own as one batch; None: they are read by groups of equal length."""
        return None

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        num_asked: int = 0,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The next tokens of a batch.

        Args:
            input_ids: (b n), or embeddings of them in inputs_embeds (b n dim)
            attention_mask: (b n), or (b m) of which the last n columns count: a token with a 0 leaves no trace
            past_key_values: of the tokens before, and is advanced in place; None: sequences begin
            inputs_embeds: (b n dim)
            use_cache: return past_key_values; None: as the configuration says, and not in training
            output_hidden_states: return what each layer was given, and the features
            output_attentions: there are none that transformers knows
            num_asked: of so many last tokens logits will be asked, 0: all; see `TitansCache.advance`
            kwargs: documents in one row, as collators describe them; see `marks_of_call`

        Returns: features (b n dim), 0 for padded tokens
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("exactly one of input_ids and inputs_embeds must be given")
        if output_attentions:
            raise ValueError("output_attentions must be False, these models have no attention over all tokens to give")
        notes_layers = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds

        def read(piece: Tensor, state: Any) -> tuple[Tensor, Any]:
            return self.read(piece, state, notes_layers=bool(notes_layers))

        marks, cache = marks_of_call(x, attention_mask, past_key_values, kwargs), None
        if past_key_values is None and (not use_cache or (marks is not None and marks.documents is not None)):
            outputs = read_without_state(read, x, marks, None)
        else:
            cache = checked_cache(past_key_values)
            mask = None if marks is None or marks.mask is None or bool(marks.mask.all()) else marks.mask
            by_rows = None if notes_layers or torch.is_grad_enabled() else self.by_rows
            outputs = cache.advance(read, Fed(x, mask), num_asked, by_rows)
        of_layers = outputs.unbind(dim=2)
        return BaseModelOutputWithPast(
            last_hidden_state=of_layers[-1],
            past_key_values=cache if use_cache else None,  # type: ignore[arg-type]
            hidden_states=of_layers if notes_layers else None,
        )

    def call(self, layer: nn.Module, *arguments: Any) -> Any:
        """Call a layer, in training with gradient checkpointing so that it is computed again in the backward pass."""
        if not (self.gradient_checkpointing and self.training):
            return layer(*arguments)
        checkpoint = self._gradient_checkpointing_func
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError("gradient checkpointing must have use_reentrant=False: it follows states, got True")
        return checkpoint(layer.__call__, *arguments)


class TitansModel(StreamingModel):
    """The blocks of MAC, MAG, MAL or LMM with an embedding, without a head."""

    config: TitansModelConfig
    config_class = TitansModelConfig

    def __init__(self, config: TitansModelConfig) -> None:
        super().__init__(config)
        self.backbone = TitansBackbone(config.variant, config.titans_config())  # first, as the library's models draw it
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.was_on_meta = self.embed_tokens.weight.is_meta
        self.post_init()

    def read(self, x: Tensor, state: TitansState | None, *, notes_layers: bool) -> tuple[Tensor, TitansState]:
        given: list[Tensor] = []

        def call(block: nn.Module, x: Tensor, *arguments: Any) -> tuple[Tensor, Any]:
            if notes_layers:
                given.append(x)
            answer: tuple[Tensor, Any] = self.call(block, x, *arguments)
            return answer

        outputs, state = self.backbone.read(x, state, call=call)
        return torch.stack((*given, outputs) if notes_layers else (outputs,), dim=2), state

    def by_rows(self) -> RowModel | None:
        return None if why_not_by_rows(self.backbone) else TitansByRows(self.backbone, self.embed_tokens, nn.Identity())


class MACTransformerModel(StreamingModel):
    """The layers of `MemoryAsContextTransformer` with an embedding, without a head."""

    config: MACTransformerConfig
    config_class = MACTransformerConfig

    def __init__(self, config: MACTransformerConfig) -> None:
        super().__init__(config)
        self.transformer = MemoryAsContextTransformer(**config.arguments())
        # The embedding is here, and the head above: the transformer itself is given embeddings.
        self.embed_tokens = part(self.transformer, "token_emb")
        self.transformer.token_emb, self.transformer.to_logits = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        self.was_on_meta = self.embed_tokens.weight.is_meta
        self.post_init()

    def read(self, x: Tensor, state: MACCache | None, *, notes_layers: bool) -> tuple[Tensor, MACCache]:
        transformer, (before, count) = self.transformer, (0 if state is None else state.num_tokens, x.shape[1])
        given: list[Tensor] = []

        def call(layer: nn.Module, streams: Tensor, *arguments: Any) -> Any:
            if notes_layers:
                given.append(transformer.lengthened.drop(streams.sum(dim=2), before, count))
            return self.call(layer, streams, *arguments)

        hidden, state = transformer.hidden_of(x, state, call=call)
        outputs = transformer.norm(hidden)
        return torch.stack((*given, outputs) if notes_layers else (outputs,), dim=2), state

    def by_rows(self) -> RowModel | None:
        stack = self.transformer.stack
        return None if why_not_stack_by_rows(stack) else MACByRows(stack, self.embed_tokens, nn.Identity())


def part(model: nn.Module, name: str) -> Any:
    """A part of a model, by name."""
    return model.get_submodule(name)


def checked_cache(given: Any) -> TitansCache:
    """The cache that was given, or a new one; keys and values of other models are of no use here."""
    if given is None:
        return TitansCache()
    if not isinstance(given, TitansCache):
        raise TypeError(f"past_key_values must be a TitansCache, got {type(given).__name__}")
    return given
