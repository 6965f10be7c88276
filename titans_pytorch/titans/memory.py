"""The memory of a block, as a config asks for it."""

from __future__ import annotations

from typing import Any

from titans_pytorch.fast_weights.rules.registry import forgets
from titans_pytorch.memory.delta import LINEAR
from titans_pytorch.memory.paper import form_options, of_token
from titans_pytorch.memory_models import ALONE, arguments_of
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.titans.config import TitansConfig
from titans_pytorch.tnt_memory import TNTMemory

NEVER = -80.0
"""A logit whose sigmoid is nothing beside 1, in float64 too"""


def decay_bias(config: TitansConfig) -> float:
    """The logit of forgetting at the start, of whatever shares it."""
    return of_token(config.decay_bias, config.memory_chunk) if config.token_gates else config.decay_bias


def model_options(config: TitansConfig) -> dict[str, Any]:
    """What the memory is."""
    sizes = dict(depth=config.memory_depth, expansion_factor=config.memory_expansion)
    known = arguments_of(config.memory_model)
    arguments = {name: size for name, size in sizes.items() if name in known}
    form: dict[str, Any] = dict(model=config.memory_model, default_model_kwargs=arguments)
    return form | LINEAR if config.memory_model in ALONE else form


def make_memory(config: TitansConfig) -> NeuralMemory | TNTMemory:
    """Shaped as the paper's (`memory.paper`), with the sizes and switches of the config."""
    memory = make_tnt(config) if config.memory_local_chunks else make_single(config)
    if not config.decay and forgets(config.memory_rule):  # and it stays so
        for each in memory.modules():
            if isinstance(each, NeuralMemory):
                each.to_decay_factor.requires_grad_(False)
    return memory


def shared_options(config: TitansConfig) -> dict[str, Any]:
    """What does not depend on how time is cut."""
    options: dict[str, Any] = dict(
        dim_head=config.dim // config.num_memories,
        conv_size=config.conv_size,
        qk_l2norm=config.qk_l2norm,
        momentum=config.momentum,
        default_step_transform_max_lr=config.max_step,
        rule=config.memory_rule,
        loss=config.memory_loss,
        **model_options(config),
    )
    return options | dict(config.memory_options)


def make_single(config: TitansConfig) -> NeuralMemory:
    """One memory."""
    steps: dict[str, Any] = dict(chunk_size=config.gate_chunk, batch_size=config.memory_refresh)
    if forgets(config.memory_rule):
        steps |= dict(init_decay_bias=decay_bias(config) if config.decay else NEVER)
    memory = NeuralMemory(**form_options(config.dim, config.num_memories) | steps | shared_options(config))
    memory.init_as_association()
    return memory


def make_tnt(config: TitansConfig) -> TNTMemory:
    """A memory whose chunks are those of the config, and local ones beside it."""
    return TNTMemory(
        config.dim,
        config.num_memories,
        global_chunk=config.memory_chunk,
        local_chunks=config.memory_local_chunks,
        shard=config.memory_shard,
        qk_projection=config.memory_qk_projection,
        token_gates=config.token_gates,
        decay_bias=config.decay_bias if config.decay else NEVER,
        options=shared_options(config),
    )
