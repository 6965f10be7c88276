"""Configurations under the names that transformers knows, which become what the library's models are made of."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from titans_pytorch.checks import value_checks
from titans_pytorch.mac.config import MACConfig
from titans_pytorch.mac_transformer import MemoryAsContextTransformer
from titans_pytorch.pretrained import described, rebuilt
from titans_pytorch.titans.config import TitansConfig
from titans_pytorch.titans.language_model import TitansLanguageModel, TitansLMM, TitansMAC, TitansMAG, TitansMAL

VARIANTS: dict[str, type[TitansLanguageModel]] = {
    model.variant: model for model in (TitansMAC, TitansMAG, TitansMAL, TitansLMM)
}


class LibraryConfig(PreTrainedConfig):
    """What both families have: a vocabulary, sizes under the names of transformers, and settings of the library.

    Sizes are fields, no properties, as peft and others read `config.to_dict()`; the library's names for them work, too.
    Settings that are modules or functions are kept as the JSON by which the library's own files describe them.
    """

    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    described_settings: ClassVar[tuple[str, ...]] = ()

    vocab_size: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_known(kwargs, [*self.__dataclass_fields__, *self.attribute_map])
        for name in self.described_settings:
            setattr(self, name, described(getattr(self, name)))
        super().__post_init__(**kwargs)

    def settings(self, names: Iterable[str]) -> dict[str, Any]:
        """The fields with these names of the library, with what was described built again."""
        return {name: rebuilt(name, getattr(self, name)) for name in names}


class TitansModelConfig(LibraryConfig):
    """A model of the paper, to be built by transformers; see `TitansConfig` for what the library's settings mean.

    Attributes:
        variant: mac, mag, mal or lmm
    """

    model_type = "titans"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_tokens": "vocab_size",
        "dim": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "ff_hidden": "intermediate_size",
    }
    described_settings: ClassVar[tuple[str, ...]] = ("memory_options",)

    variant: str = "mag"
    window: int = 128
    num_persistent: int = 4
    gate: str = "mix"
    layer_residual: bool = True
    memory: bool = True
    memory_heads: int | None = None
    memory_depth: int = 2
    memory_expansion: int | float = 4.0
    memory_chunk: int = 8
    memory_refresh: int | None = 16
    conv_size: int | None = 4
    qk_l2norm: bool = True
    momentum: bool = True
    decay: bool = True
    max_step: int | float = TitansConfig.max_step
    decay_bias: int | float = TitansConfig.decay_bias
    memory_options: dict[str, Any] | None = None
    memory_layers: list[int] | tuple[int, ...] | None = None
    memory_model: str = "mlp"
    memory_loss: str | None = None
    memory_rule: str = "titans"
    token_gates: bool = False
    memory_local_chunks: list[int] | tuple[int, ...] = ()
    memory_shard: int = 512
    memory_qk_projection: str | None = "shard"

    def __post_init__(self, **kwargs: Any) -> None:
        self.memory_options = self.memory_options or {}
        super().__post_init__(**kwargs)
        value_checks.check_choice("variant", self.variant, tuple(VARIANTS))
        self.titans_config()  # refuses what does not fit

    def titans_config(self) -> TitansConfig:
        """The library's configuration with these sizes and settings."""
        settings = self.settings(TitansConfig.__dataclass_fields__)
        for name in ("memory_layers", "memory_local_chunks"):
            settings[name] = None if settings[name] is None else tuple(settings[name])
        return TitansConfig(**settings)

    @classmethod
    def of(cls, variant: str, num_tokens: int, config: TitansConfig, **kwargs: Any) -> TitansModelConfig:
        """The configuration of a model of the library, with further fields of transformers."""
        settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(TitansConfig)}
        return cls(variant=variant, **as_fields(cls, settings | {"num_tokens": num_tokens}), **kwargs)


class MACTransformerConfig(LibraryConfig):
    """A `MemoryAsContextTransformer`, to be built by transformers; that class says what the settings mean."""

    model_type = "titans_mac_transformer"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_tokens": "vocab_size",
        "dim": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "dim_head": "head_dim",
        "ff_hidden": "intermediate_size",
    }
    described_settings: ClassVar[tuple[str, ...]] = ("neural_memory_model", "neural_memory_kwargs")

    num_attention_heads: int = 8
    head_dim: int = 64
    segment_len: int = 128
    neural_memory_segment_len: int | None = None
    neural_mem_gate_attn_output: bool = False
    neural_memory_add_value_residual: bool = False
    num_longterm_mem_tokens: int = 0
    num_persist_mem_tokens: int = 0
    neural_memory_batch_size: int | None = None
    neural_memory_qkv_receives_diff_views: bool = False
    ff_mult: int | float = 4
    num_residual_streams: int = 4
    neural_memory_model: Any = None
    neural_memory_kwargs: dict[str, Any] | None = None
    neural_memory_layers: list[int] | tuple[int, ...] | None = None
    use_flex_attn: bool = False
    sliding_window_attn: bool = False
    neural_mem_weight_residual: bool = False

    def arguments(self) -> dict[str, Any]:
        """What `MemoryAsContextTransformer` is constructed with."""
        return self.settings(MAC_ARGUMENTS)

    @classmethod
    def of(cls, model: MemoryAsContextTransformer, **kwargs: Any) -> MACTransformerConfig:
        """The configuration of a model of the library, with further fields of transformers."""
        return cls(**as_fields(cls, {name: getattr(model.config, name) for name in MAC_ARGUMENTS}), **kwargs)


MAC_ARGUMENTS = tuple(MACConfig.__dataclass_fields__)
"""Names of the arguments of `MemoryAsContextTransformer`"""


def as_fields(cls: type[LibraryConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names of the fields they are in."""
    return {cls.attribute_map.get(name, name): described(value) for name, value in settings.items()}


def check_known(given: Mapping[str, Any], names: list[str]) -> None:
    """Refuse a misspelt setting; other keywords are transformers' own."""
    for name in given:
        if name not in names and (close := get_close_matches(name, names, n=1, cutoff=0.8)):
            raise TypeError(f"{name} is no setting of this configuration, did you mean {close[0]}?")
