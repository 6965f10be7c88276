"""The memory of a block, as a config asks for it."""

from __future__ import annotations

from typing import Any

from titans_pytorch.memory.delta import LINEAR
from titans_pytorch.memory.paper import form_options, of_token
from titans_pytorch.memory_models import ALONE, arguments_of
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.titans.config import TitansConfig

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


def make_memory(config: TitansConfig) -> NeuralMemory:
    """Shaped as the paper's (`memory.paper`), with the sizes and switches of the config."""
    options = form_options(
        config.dim,
        config.num_memories,
        chunk_size=config.gate_chunk,
        batch_size=config.memory_refresh,
        dim_head=config.dim // config.num_memories,
        conv_size=config.conv_size,
        qk_l2norm=config.qk_l2norm,
        momentum=config.momentum,
        default_step_transform_max_lr=config.max_step,
        init_decay_bias=decay_bias(config) if config.decay else NEVER,
        rule=config.memory_rule,
        loss=config.memory_loss,
        **model_options(config),
    )
    memory = NeuralMemory(**options | dict(config.memory_options))
    memory.init_as_association()
    if not config.decay:  # and it stays so
        memory.to_decay_factor.requires_grad_(False)
    return memory
