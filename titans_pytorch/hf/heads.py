"""Logits and losses on top of the models, and what `generate` has to be told about them."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from titans_pytorch.causal_lm import targets_of
from titans_pytorch.hf.cache import TitansCache
from titans_pytorch.hf.config import MACTransformerConfig, TitansModelConfig
from titans_pytorch.hf.documents import OF_COLLATORS, marks_of_call
from titans_pytorch.hf.models import MACTransformerModel, StreamingModel, TitansModel, checked_cache
from titans_pytorch.hf.pretrained_model import TitansPreTrainedModel


class CausalHead(TitansPreTrainedModel, GenerationMixin):
    """A language model of either family."""

    model: StreamingModel
    lm_head: nn.Linear
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def add_head(self) -> None:
        """The last part of a constructor."""
        self.lm_head = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)
        self.was_on_meta = self.lm_head.weight.is_meta
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value  # type: ignore[assignment]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The next tokens of a batch; what is not said here is said by the model's `forward`.

        Args:
            labels: (b n), ids, which are shifted here, or -100; padded tokens and the first ones of documents, which
                nobody predicts, do not count
            logits_to_keep: logits of so many last tokens, or of tokens at these places; 0: of all
            kwargs: documents in one row, and arguments of the loss
        """
        documents = {name: kwargs.pop(name) for name in OF_COLLATORS if name in kwargs}
        read = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            num_asked=logits_to_keep if isinstance(logits_to_keep, int) else 0,
            **documents,
        )
        hidden = read.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])
        loss = None
        if labels is not None:
            targets = targets_of(labels, marks_of_call(hidden, attention_mask, past_key_values, documents))
            kwargs = {"shift_labels": targets[:, kept]} | kwargs
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=read.past_key_values, hidden_states=read.hidden_states
        )

    # ---- generation

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any
    ) -> None:
        """Assisted decoding wants a cache before the first call, and a `DynamicCache` would be of no use."""
        if (name := generation_config.cache_implementation) is not None:
            warnings.warn(
                f"cache_implementation={name!r} has no effect: a TitansCache has one form, of constant size",
                stacklevel=2,
            )
        if model_kwargs.get("past_key_values") is not None:
            checked_cache(model_kwargs["past_key_values"])._is_user_defined = True  # type: ignore[attr-defined]
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = cache = TitansCache()
            if generation_config.is_assistant:
                cache.activate_past_recording()


class TitansForCausalLM(CausalHead):
    """MAC, MAG, MAL or LMM as a language model."""

    config: TitansModelConfig
    config_class = TitansModelConfig

    def __init__(self, config: TitansModelConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.add_head()


class MACTransformerForCausalLM(CausalHead):
    """`MemoryAsContextTransformer` as a language model."""

    config: MACTransformerConfig
    config_class = MACTransformerConfig

    def __init__(self, config: MACTransformerConfig) -> None:
        super().__init__(config)
        self.model = MACTransformerModel(config)
        self.add_head()
