"""The models of the training scripts, as settings: every field is an option of the command line."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import nn

from titans_pytorch.attention_transformer import AttentionTransformer
from titans_pytorch.layers.feed_forward import hidden_width
from titans_pytorch.mac_transformer import MemoryAsContextTransformer
from titans_pytorch.memory_models import MemoryMLP
from titans_pytorch.public_names import register_named
from titans_pytorch.titans import TitansConfig, TitansLMM, TitansMAC, TitansMAG, TitansMAL
from titans_pytorch.titans.config import Variant
from titans_pytorch.titans.language_model import TitansLanguageModel
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.settings import setting
from titans_pytorch.training.text import ByteText


@dataclass(frozen=True)
class MACModel:
    """`MemoryAsContextTransformer`; the defaults are the published train_mac configuration."""

    memory: bool = setting(True, "off: no memory, wider feed-forward networks of as many parameters")
    dim: int = setting(384, "features of a token")
    depth: int = setting(8, "layers")
    heads: int = setting(8, "heads of attention")
    dim_head: int = setting(64, "width of a head of attention")
    window: int = setting(32, "tokens that attention sees")
    sliding: bool = setting(True, "every token sees the window before it, not only its own")
    persistent_tokens: int = setting(4, "learned keys and values that all tokens see")
    longterm_tokens: int = setting(4, "learned tokens inserted after each window")
    residual_streams: int = setting(4, "hyper-connection streams; 1: a plain residual")
    ff_mult: float = setting(4.0, "width of feed-forward networks")

    memory_layers: tuple[int, ...] = setting((2, 4, 6), "numbers of the layers with a memory, from 1")
    memory_chunk: int = setting(4, "tokens of a step of the memory")
    memory_batch: int = setting(128, "tokens after which surprises are taken at the current memory; 0: never")
    memory_depth: int = setting(2, "layers of the memory's own network")
    memory_heads: int = setting(4, "memories per layer")
    memory_dim_head: int = setting(64, "their width")
    memory_max_lr: float = setting(0.1, "largest step of the memory")
    momentum: bool = setting(True, "surprises carry on")
    momentum_order: int = setting(1, "orders of momentum")
    attn_pool: bool = setting(True, "a chunk's gates come from attention over it, not from its mean")
    qk_rmsnorm: bool = setting(True, "norm the memory's queries and keys")
    spectral_norm: bool = setting(True, "orthogonalise surprises")
    per_parameter_lr: bool = setting(True, "a learned step for every matrix of the memory")
    weight_residual: bool = setting(True, "surprises see the memory of the layer before")
    views: bool = setting(True, "memories read a mix of all that earlier layers saw")
    gates_attention: bool = setting(False, "what is read gates attention instead of joining the streams")

    def build(self, num_tokens: int = ByteText.num_tokens) -> MemoryAsContextTransformer:
        if self.memory:
            return self.with_layers(self.memory_layers, None, num_tokens)
        return self.with_layers((), self.matched_ff_hidden(num_tokens), num_tokens)

    def matched_ff_hidden(self, num_tokens: int = ByteText.num_tokens) -> int:
        """The width of feed-forward networks at which a model without memory has as many parameters as one with it."""
        with torch.device("meta"):  # only counted
            wanted = size(self.with_layers(self.memory_layers, None, num_tokens))
            bare = size(self.with_layers((), None, num_tokens))
        # One more hidden feature of a layer: two rows and biases into it, one column out of it.
        more = round((wanted - bare) / (self.depth * (3 * self.dim + 2)))
        return hidden_width(self.dim, self.ff_mult) + more

    def with_layers(
        self, memory_layers: tuple[int, ...], ff_hidden: int | None, num_tokens: int
    ) -> MemoryAsContextTransformer:
        """The model with memories in these layers.  ff_hidden: None for the width that ff_mult asks for"""
        arguments = self.arguments(memory_layers, num_tokens) | self.memory_arguments()
        return MemoryAsContextTransformer(**arguments, ff_hidden=ff_hidden)

    def arguments(self, memory_layers: tuple[int, ...], num_tokens: int) -> dict[str, Any]:
        """What is around the memories."""
        return dict(
            num_tokens=num_tokens,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            dim_head=self.dim_head,
            segment_len=self.window,
            sliding_window_attn=self.sliding,
            num_persist_mem_tokens=self.persistent_tokens,
            num_longterm_mem_tokens=self.longterm_tokens,
            num_residual_streams=self.residual_streams,
            ff_mult=self.ff_mult,
            neural_memory_layers=memory_layers,
            neural_memory_segment_len=self.memory_chunk,
            neural_memory_batch_size=self.memory_batch or None,
            neural_mem_weight_residual=self.weight_residual,
            neural_memory_qkv_receives_diff_views=self.views,
            neural_mem_gate_attn_output=self.gates_attention,
        )

    def memory_arguments(self) -> dict[str, Any]:
        return dict(
            neural_memory_model=MemoryMLP(dim=self.memory_dim_head, depth=self.memory_depth),
            neural_memory_kwargs=dict(
                dim_head=self.memory_dim_head,
                heads=self.memory_heads,
                attn_pool_chunks=self.attn_pool,
                qk_rmsnorm=self.qk_rmsnorm,
                momentum=self.momentum,
                momentum_order=self.momentum_order,
                default_step_transform_max_lr=self.memory_max_lr,
                spectral_norm_surprises=self.spectral_norm,
                per_parameter_lr_modulation=self.per_parameter_lr,
            ),
        )

    @classmethod
    def from_run(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Settings as a run has saved them, with the values of today."""
        return saved | {"memory": saved.get("memory") in (True, "on")}

    def check(self) -> None:
        """Refuse what cannot be a model, in one sentence."""
        if not self.memory_layers:
            raise SettingsError("--memory-layers must name at least one layer, got none: --memory off has no memory")


MODELS: dict[str, type[TitansLanguageModel]] = {
    model.variant: model for model in (TitansMAC, TitansMAG, TitansMAL, TitansLMM)
}
for each in MODELS.values():
    register_named(each.__name__.replace("Titans", "Trained"), each)  # as runs called them before 0.6

OLD_SETTINGS = {"persistent_tokens": "num_persistent", "memory_max_lr": "max_step", "conv": "conv_size"}
"""Names of settings in the files of older runs, and what they are now"""


@dataclass(frozen=True)
class PaperModel(TitansConfig):
    """The four models of the paper: every field of their config is an option, and which of them it is."""

    dim: int = 384
    depth: int = 8
    variant: Variant = field(default="mac", metadata={"help": "memory as context, gate or layer, or alone"})

    @classmethod
    def from_run(cls, saved: dict[str, Any]) -> dict[str, Any]:
        """Settings as a run has saved them, with the names and values of today."""
        settings = {OLD_SETTINGS.get(name, name): value for name, value in saved.items()}
        for name in ("conv_size", "memory_refresh"):
            settings[name] = settings.get(name) or None  # 0 was none
        return settings | {"memory": settings.get("memory") in (True, "on")}

    def build(self, num_tokens: int = ByteText.num_tokens) -> TitansLanguageModel:
        config = {each.name: getattr(self, each.name) for each in fields(TitansConfig)}
        return MODELS[self.variant](num_tokens, TitansConfig(**config))


@dataclass(frozen=True)
class AttentionModel:
    """`AttentionTransformer`."""

    attention: Literal["implicit-mlp", "nested", "full"] = setting("implicit-mlp", "kind of attention")
    dim: int = setting(512, "features of a token")
    depth: int = setting(8, "layers")
    heads: int = setting(8, "heads of attention")
    dim_head: int = setting(64, "width of a head (of nested and full attention)")
    mlp_hiddens: tuple[int, ...] = setting((64, 128, 64), "widths of the implicit MLP")
    ff_mult: float = setting(4.0, "width of feed-forward networks")

    def build(self, num_tokens: int = ByteText.num_tokens) -> AttentionTransformer:
        return AttentionTransformer(
            num_tokens=num_tokens,
            dim=self.dim,
            depth=self.depth,
            attention=self.attention,
            heads=self.heads,
            dim_head=self.dim_head,
            mlp_hiddens=self.mlp_hiddens,
            ff_mult=self.ff_mult,
        )


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
