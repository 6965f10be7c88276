"""What a Titans model is made of, as data; the sizes of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

from titans_pytorch.checks import value_checks
from titans_pytorch.fast_weights.rules.registry import make_of
from titans_pytorch.losses import loss_by_name
from titans_pytorch.memory import atlas, delta, lact
from titans_pytorch.memory.miras import kind_of_miras
from titans_pytorch.memory.options import SpanKind
from titans_pytorch.memory.paper import DECAY_BIAS, MAX_STEP
from titans_pytorch.memory_models import MODELS
from titans_pytorch.public_names import register_named

Variant = Literal["mac", "mag", "mal", "lmm"]
GateForm = Literal["mix", "attention", "memory", "product"]

PAPER_TOKENS = 32_000
"""Size of the vocabulary of the paper's models"""

SET_BY_THE_CONFIG = (
    "dim",
    "chunk_size",
    "batch_size",
    "heads",
    "dim_head",
    "momentum",
    "conv_size",
    "qk_l2norm",
    "default_step_transform_max_lr",
    "init_decay_bias",
    "shard",
    "qk_projection",
    "default_model_kwargs",
)


@dataclass(frozen=True)
class TitansConfig:
    """Sizes and switches of all four models; what a model has no use for is ignored by it.

        config = TitansConfig(dim=256, depth=4, window=64)
        ablated = replace(config, momentum=False)

    Args:
        dim: features of a token
        depth: blocks
        heads: of attention, `dim / heads` wide
        window: tokens that attention sees, the query included: the segment of MAC, the sliding window of MAG and MAL
        num_persistent: learned tokens in front of the sequence (eq. 19), in every block its own
        ff_hidden: width of the feed-forward networks; None: 8/3 dim, rounded up to a multiple of 32
        gate: how attention and memory are combined (eqs. 25 and 28), see `titans.gate`
        layer_residual: inside blocks of MAC and MAL every layer has a residual connection of its own, not the block
            alone: what MAC writes is x + y, and MAL adds both M(x) and what attention makes of x + M(x)
        memory: False leaves the memory out, for comparison
        memory_layers: numbers, from 1, of the blocks with a memory; None: all. The others keep all else
        memory_heads: memories per block, `dim / memory_heads` wide each; None: as many as attention has
        memory_depth: layers of the memory's MLP (1: linear)
        memory_expansion: width of its hidden layers over its own
        memory_chunk: tokens that share one step; every token reads the memory after the last complete chunk
        memory_refresh: tokens after which gradients are taken at the current memory; None: always at the initial one
        conv_size: tokens that convolutions of queries, keys and values see; None: no convolution
        qk_l2norm: queries and keys have length 1
        momentum: past surprise (eq. 10)
        decay: forgetting (eq. 13)
        max_step: the largest step size
        decay_bias: what the logit of forgetting starts with
        memory_model: the memory by name, as `NeuralMemory(model=...)`; `linear` is one matrix without a norm and
            without a limit to its growth, which is exact and fast where memory_chunk and memory_refresh are 1
            (docs/rules.md)
        memory_loss: the key-value loss by name; None: the mean squared error
        memory_rule: how the memory follows from surprises, by name
        token_gates: momentum and forgetting of every token, not of every chunk: memory_chunk then only says for how
            many tokens decay_bias is meant, and every token reads what has been stored up to it
        memory_local_chunks: of local memories beside a global one, the tokens that each of them stores at once (TNT,
            `TNTMemory`); the chunk of the global memory is memory_chunk, and memory_refresh has to be the same; none:
            one memory. MAC has no use for them
        memory_shard: tokens after which local memories restart
        memory_qk_projection: on the keys of which span their queries are projected: shard, chunk or None
        memory_options: further arguments of `NeuralMemory`, which win over the family's: SiLU, gated_output and
            learned_norm_gain are on
    """

    dim: int
    depth: int
    heads: int = 4
    window: int = 128
    num_persistent: int = 4
    ff_hidden: int | None = None
    gate: GateForm = "mix"
    layer_residual: bool = True
    memory: bool = True
    memory_heads: int | None = None
    memory_depth: int = 2
    memory_expansion: float = 4.0
    memory_chunk: int = 8
    memory_refresh: int | None = 16
    conv_size: int | None = 4
    qk_l2norm: bool = True
    momentum: bool = True
    decay: bool = True
    max_step: float = MAX_STEP
    decay_bias: float = DECAY_BIAS
    memory_options: Mapping[str, Any] = field(default_factory=dict)
    memory_layers: tuple[int, ...] | None = None
    memory_model: str = "mlp"
    memory_loss: str | None = None
    memory_rule: str = "titans"
    token_gates: bool = False
    memory_local_chunks: tuple[int, ...] = ()
    memory_shard: int = 512
    memory_qk_projection: SpanKind | None = "shard"

    def __post_init__(self) -> None:
        value_checks.check_whole(
            dim=self.dim,
            depth=self.depth,
            heads=self.heads,
            window=self.window,
            ff_hidden=self.ff_hidden,
            memory_heads=self.memory_heads,
            memory_depth=self.memory_depth,
            memory_chunk=self.memory_chunk,
            memory_refresh=self.memory_refresh,
            conv_size=self.conv_size,
        )
        value_checks.check_counts(num_persistent=self.num_persistent)
        value_checks.check_positive(memory_expansion=self.memory_expansion, max_step=self.max_step)
        value_checks.check_number(decay_bias=self.decay_bias)
        for name in ("heads", "memory_heads"):
            heads = getattr(self, name)
            if heads is not None and self.dim % heads:
                raise ValueError(f"{name} must divide dim {self.dim}, got {heads}")
        value_checks.check_even(**{"dim / heads": self.dim // self.heads})
        value_checks.check_multiple("memory_refresh", self.memory_refresh, self.memory_chunk)
        value_checks.check_choice("gate", self.gate, get_args(GateForm))
        value_checks.check_choice("memory_model", self.memory_model, tuple(MODELS))
        make_of(self.memory_rule, "memory_rule")
        value_checks.check_switches(token_gates=self.token_gates)
        if self.memory_loss is not None:
            loss_by_name(self.memory_loss, "memory_loss")
        self.check_local_memories()
        value_checks.check_layers("memory_layers", self.memory_layers, self.depth)
        value_checks.check_reserved("memory_options", self.memory_options, SET_BY_THE_CONFIG, "config")

    def check_local_memories(self) -> None:
        """Whole chunks in a shard, and a global memory that is surprised at its newest weights."""
        value_checks.check_whole(memory_shard=self.memory_shard)
        value_checks.check_choice("memory_qk_projection", self.memory_qk_projection, (None, *get_args(SpanKind)))
        if not self.memory_local_chunks:
            return
        for chunk in value_checks.check_sizes("memory_local_chunks", self.memory_local_chunks):
            if self.memory_shard % chunk:
                raise ValueError(f"memory_local_chunks must divide the shard ({self.memory_shard}), got {chunk}")
        if self.memory_refresh != self.memory_chunk:
            raise ValueError(
                f"memory_refresh must be memory_chunk ({self.memory_chunk}) with memory_local_chunks, "
                f"got {self.memory_refresh}"
            )

    @property
    def hidden(self) -> int:
        return -(-self.dim * 8 // 3 // 32) * 32 if self.ff_hidden is None else self.ff_hidden

    @property
    def gate_chunk(self) -> int:
        """Tokens that share momentum and forgetting."""
        return 1 if self.token_gates else self.memory_chunk

    @property
    def num_memories(self) -> int:
        """Heads of the memory of a block."""
        return self.heads if self.memory_heads is None else self.memory_heads

    def of_block(self, number: int) -> TitansConfig:
        """What the block with this number, from 1, is made of: without a memory if it is not to have one."""
        if self.memory_layers is None or number in self.memory_layers:
            return self
        return replace(self, memory=False)

    @classmethod
    def delta(cls, dim: int, depth: int, **overrides: Any) -> TitansConfig:
        """Linear memories with the gated delta rule, surprised at every token, as `NeuralMemory.delta`."""
        linear: dict[str, Any] = dict(
            memory_model="linear", memory_rule="gated_delta", memory_loss="sse", momentum=False
        )
        steps = dict(memory_chunk=1, memory_refresh=1, max_step=delta.MAX_STEP, decay_bias=delta.DECAY_BIAS)
        return cls(dim=dim, depth=depth, **linear | steps | overrides)

    @classmethod
    def omeganet(cls, dim: int, depth: int, **overrides: Any) -> TitansConfig:
        """Memories whose steps follow a window of surprises, of every token, as `NeuralMemory.omeganet`."""
        options = dict(window=atlas.WINDOW, key_powers=atlas.KEY_POWERS) | overrides.pop("memory_options", {})
        tokens = dict(token_gates=True, momentum=False, max_step=MAX_STEP / options["window"], memory_chunk=16)
        return cls(dim=dim, depth=depth, memory_options=options, **tokens | overrides)

    @classmethod
    def atlas(cls, dim: int, depth: int, **overrides: Any) -> TitansConfig:
        """Memories with a window, momentum and orthogonal steps, as `NeuralMemory.atlas`."""
        return cls.omeganet(dim, depth, **dict(memory_rule="atlas", momentum=True) | overrides)

    @classmethod
    def miras(cls, kind: str, dim: int, depth: int, **overrides: Any) -> TitansConfig:
        """Memories of Miras, yaad, moneta or memora, as `NeuralMemory.miras`."""
        own = {f"memory_{name}": value for name, value in kind_of_miras(kind).items()}
        return cls(dim=dim, depth=depth, **dict(momentum=False, memory_refresh=8) | own | overrides)

    @classmethod
    def lact(cls, dim: int, depth: int, *, chunk: int = lact.CHUNK, **overrides: Any) -> TitansConfig:
        """Memories of LaCT (arXiv 2505.23884), for MAG: long chunks, a window as long, gated networks, norms that stay.

        As `NeuralMemory.lact`. With memory_options=dict(spectral_norm_surprises=True) steps are orthogonal.
        """
        form: dict[str, Any] = dict(memory_model="glu", memory_rule="lact", memory_loss="dot", memory_expansion=2.0)
        value_checks.check_whole(chunk=chunk)
        cut = dict(memory_chunk=chunk, memory_refresh=chunk, window=chunk, max_step=lact.STEPS_OF_A_CHUNK / chunk)
        form["memory_options"] = dict(apply_then_update=True) | overrides.pop("memory_options", {})
        return cls(dim=dim, depth=depth, **form | cut | overrides)

    @classmethod
    def tnt(
        cls,
        dim: int,
        depth: int,
        *,
        global_chunk: int = 512,
        local_chunks: tuple[int, ...] = (8,),
        shard: int = 512,
        **overrides: Any,
    ) -> TitansConfig:
        """A global memory with long chunks and local ones that restart, as `TNTMemory`, for MAG, MAL and LMM.

        There are no persistent tokens, with which sequences would not begin where shards do. The second stage of
        training is `dataclasses.replace(config, memory_local_chunks=...)` with smaller ones, on the same parameters.
        """
        cut = dict(memory_chunk=global_chunk, memory_refresh=global_chunk, memory_shard=shard, num_persistent=0)
        return cls(dim=dim, depth=depth, **dict(memory_local_chunks=local_chunks) | cut | overrides)

    @classmethod
    def preset(cls, size: str, variant: Variant, num_tokens: int = PAPER_TOKENS) -> TitansConfig:
        """A model of the paper's sizes, with what it does not say chosen as `preset` explains.

        Args:
            size: 170M, 340M, 400M, 760M or 1.3B parameters, with so many tokens in the vocabulary
            variant: mac, mag, mal or lmm
            num_tokens: size of the vocabulary
        """
        return preset(size, variant, num_tokens)


class Size(NamedTuple):
    """A row of the paper's table of sizes."""

    parameters: float
    depth: int
    dim: int
    heads: int


SIZES = {
    "170M": Size(170e6, 12, 768, 16),
    "340M": Size(340e6, 24, 1024, 16),
    "400M": Size(400e6, 24, 1024, 16),  # the paper does not give its shape: that of 340M, with wider networks
    "760M": Size(760e6, 24, 1536, 16),
    "1.3B": Size(1.3e9, 18, 2048, 8),
}
MIXER_MATRICES: dict[Variant, int] = {"mac": 9, "mag": 9, "mal": 9, "lmm": 5}
"""How many matrices dim x dim a mixer has: queries, keys, values, gate and output of the memory, those of attention"""

PAPER_MEMORY = dict(per_parameter_gates=True, channelwise_decay=True)


def preset(size: str, variant: Variant, num_tokens: int = PAPER_TOKENS) -> TitansConfig:
    """A model of the paper: blocks, width, heads, 128 persistent tokens, chunks of 16, segments of 512, window 2048.

    The paper does not say how wide feed-forward networks are: as wide as it takes to be of the size that is named. That
    differs between the variants, as attention and memory have parameters of their own.
    """
    value_checks.check_choice("size", size, tuple(SIZES))
    value_checks.check_choice("variant", variant, get_args(Variant))
    shape = SIZES[size]
    config = TitansConfig(
        dim=shape.dim,
        depth=shape.depth,
        heads=shape.heads,
        window=512 if variant == "mac" else 2048,
        num_persistent=128,
        memory_chunk=16,
        memory_refresh=16,
        memory_options=PAPER_MEMORY,
    )
    mixer = MIXER_MATRICES[variant] * shape.dim**2 + shape.dim * config.num_persistent
    memories = 2 * config.memory_expansion * shape.dim**2 / config.num_memories
    block = (shape.parameters - 2 * num_tokens * shape.dim) / shape.depth - mixer - memories
    hidden = round(block / (3 * shape.dim) / 32) * 32
    if hidden < 32:
        raise ValueError(f"num_tokens must leave room for {shape.depth} blocks in {size} parameters, got {num_tokens}")
    return replace(config, ff_hidden=hidden)


register_named("TitansConfig", TitansConfig)
