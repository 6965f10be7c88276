"""The memory of a block, as a config asks for it."""

from __future__ import annotations

from titans_pytorch.memory.paper import form_options
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.titans.config import TitansConfig

NEVER = -80.0
"""A logit whose sigmoid is nothing beside 1, in float64 too"""


def make_memory(config: TitansConfig) -> NeuralMemory:
    """Shaped as the paper's (`memory.paper`), with the sizes and switches of the config."""
    options = form_options(
        config.dim,
        config.num_memories,
        chunk_size=config.memory_chunk,
        batch_size=config.memory_refresh,
        dim_head=config.dim // config.num_memories,
        conv_size=config.conv_size,
        qk_l2norm=config.qk_l2norm,
        momentum=config.momentum,
        default_step_transform_max_lr=config.max_step,
        init_decay_bias=config.decay_bias if config.decay else NEVER,
        default_model_kwargs=dict(depth=config.memory_depth, expansion_factor=config.memory_expansion),
    )
    memory = NeuralMemory(**options | dict(config.memory_options))
    memory.init_as_association()
    if not config.decay:  # and it stays so
        memory.to_decay_factor.requires_grad_(False)
    return memory
