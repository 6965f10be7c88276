"""The models of the training scripts, as settings: every field is an option of the command line."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_pytorch.attention_transformer import AttentionTransformer
from titans_pytorch.mac_transformer import MemoryAsContextTransformer
from titans_pytorch.memory_models import MemoryMLP
from titans_pytorch.titans import TitansConfig, TitansLMM, TitansMAC, TitansMAG, TitansMAL, TitansState
from titans_pytorch.training.errors import SettingsError
from titans_pytorch.training.settings import setting

NUM_BYTES = 256


@dataclass(frozen=True)
class MACModel:
    """`MemoryAsContextTransformer`; the defaults are the published train_mac configuration."""

    memory: Literal["on", "off"] = setting("on", "off: no memory, wider feed-forward networks of as many parameters")
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

    def build(self) -> nn.Module:
        if self.memory == "on":
            return self.with_layers(self.memory_layers, self.ff_mult)
        return self.with_layers((), self.matched_ff_mult())

    def matched_ff_mult(self) -> float:
        """The width of feed-forward networks at which a model without memory has as many parameters as one with it."""
        with torch.device("meta"):  # only counted
            wanted = size(self.with_layers(self.memory_layers, self.ff_mult))
            bare = size(self.with_layers((), self.ff_mult))
        # One more hidden feature of a layer: two rows and biases into it, one column out of it.
        more = round((wanted - bare) / (self.depth * (3 * self.dim + 2)))
        hidden = int(self.dim * self.ff_mult * 2 / 3) + more
        return (hidden + 0.5) * 3 / (2 * self.dim)

    def with_layers(self, memory_layers: tuple[int, ...], ff_mult: float) -> MemoryAsContextTransformer:
        return MemoryAsContextTransformer(**self.arguments(memory_layers, ff_mult), **self.memory_arguments())

    def arguments(self, memory_layers: tuple[int, ...], ff_mult: float) -> dict[str, Any]:
        return dict(
            num_tokens=NUM_BYTES,
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            dim_head=self.dim_head,
            segment_len=self.window,
            sliding_window_attn=self.sliding,
            num_persist_mem_tokens=self.persistent_tokens,
            num_longterm_mem_tokens=self.longterm_tokens,
            num_residual_streams=self.residual_streams,
            ff_mult=ff_mult,
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

    def without_memory(self) -> MACModel:
        return replace(self, memory="off")

    def check(self) -> None:
        if not self.memory_layers:
            raise SettingsError("--memory-layers must name at least one layer, got none: --memory off has no memory")


class ForTraining:
    """A model of the Titans family, called as the trainer calls models; what it saves is that model."""

    @property
    def layers(self: Any) -> Any:
        return self.backbone.blocks

    def forward(
        self: Any, ids: Tensor, return_loss: bool = False, cache: TitansState | None = None, return_cache: bool = False
    ) -> Any:
        hidden, cache = self.backbone(self.token_emb(ids[:, :-1] if return_loss else ids), cache)
        answer = self.to_logits(hidden)
        if return_loss:
            answer = F.cross_entropy(answer.flatten(0, 1).float(), ids[:, 1:].flatten().long())
        return (answer, cache) if return_cache else answer


class TrainedMAC(ForTraining, TitansMAC):  # type: ignore[misc]  # another way to call
    pass


class TrainedMAG(ForTraining, TitansMAG):  # type: ignore[misc]  # another way to call
    pass


class TrainedMAL(ForTraining, TitansMAL):  # type: ignore[misc]  # another way to call
    pass


class TrainedLMM(ForTraining, TitansLMM):  # type: ignore[misc]  # another way to call
    pass


TITANS: dict[str, Any] = {kind.variant: kind for kind in (TrainedMAC, TrainedMAG, TrainedMAL, TrainedLMM)}


@dataclass(frozen=True)
class TitansModel:
    """The four models of the paper."""

    variant: Literal["mac", "mag", "mal", "lmm"] = setting("mac", "memory as context, gate or layer, or alone")
    memory: Literal["on", "off"] = setting("on", "off: no memory")
    dim: int = setting(384, "features of a token")
    depth: int = setting(8, "blocks")
    heads: int = setting(6, "heads of attention")
    window: int = setting(64, "tokens that attention sees: segment or sliding window")
    persistent_tokens: int = setting(4, "learned tokens in front of the sequence")
    gate: Literal["mix", "attention", "memory", "product"] = setting("mix", "how attention and memory are combined")

    memory_heads: int = setting(6, "memories per block")
    memory_depth: int = setting(2, "layers of the memory's own network, 1: linear")
    memory_expansion: float = setting(4.0, "width of its hidden layers")
    memory_chunk: int = setting(16, "tokens of a step of the memory")
    memory_refresh: int = setting(32, "tokens after which gradients are taken at the current memory; 0: never")
    memory_max_lr: float = setting(0.3, "largest step of the memory")
    conv: int = setting(4, "tokens that convolutions of queries, keys and values see; 0: no convolution")
    momentum: bool = setting(True, "surprises carry on")
    decay: bool = setting(True, "the memory forgets")

    def config(self) -> TitansConfig:
        return TitansConfig(
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            window=self.window,
            num_persistent=self.persistent_tokens,
            gate=self.gate,
            memory=self.memory == "on",
            memory_heads=self.memory_heads,
            memory_depth=self.memory_depth,
            memory_expansion=self.memory_expansion,
            memory_chunk=self.memory_chunk,
            memory_refresh=self.memory_refresh or None,
            max_step=self.memory_max_lr,
            conv_size=self.conv or None,
            momentum=self.momentum,
            decay=self.decay,
        )

    def build(self) -> nn.Module:
        return TITANS[self.variant](NUM_BYTES, self.config())

    def check(self) -> None:
        try:
            self.config()
        except (TypeError, ValueError) as error:
            raise SettingsError(str(error)) from error


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

    def build(self) -> nn.Module:
        return AttentionTransformer(
            num_tokens=NUM_BYTES,
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
