"""The memory of a block, as a config asks for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from titans_pytorch.convolution import CausalConvolution
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.titans.config import TitansConfig

NEVER = -80.0
"""A logit whose sigmoid is nothing beside 1, in float64 too"""

OTHER_TOKENS = 0.2
"""What convolutions start with, over what torch would give them, beside the one token that they start from"""


def make_memory(config: TitansConfig) -> NeuralMemory:
    options: dict[str, Any] = dict(activation=nn.SiLU(), gated_output=True, learned_norm_gain=True)
    memory = NeuralMemory(
        config.dim,
        chunk_size=config.memory_chunk,
        batch_size=config.memory_refresh,
        heads=config.num_memories,
        dim_head=config.dim // config.num_memories,
        conv_size=config.conv_size,
        qk_l2norm=config.qk_l2norm,
        momentum=config.momentum,
        default_step_transform_max_lr=config.max_step,
        init_decay_bias=config.decay_bias if config.decay else NEVER,
        default_model_kwargs=dict(depth=config.memory_depth, expansion_factor=config.memory_expansion),
        **(options | dict(config.memory_options)),
    )
    start_associating(memory)
    if not config.decay:  # and it stays so
        memory.to_decay_factor.requires_grad_(False)
    return memory


@torch.no_grad()
def start_associating(memory: NeuralMemory) -> None:
    """Begin as a memory of what followed what: a token is stored under the one before it, and asked for by itself.

    Queries start as keys, convolutions near the one token that this takes. From weights of either sign, or equal ones,
    hundreds of steps pass before a token's query finds what was stored (docs/stability.md).
    """
    if memory.num_kv_per_token == 1:
        memory.to_queries.load_state_dict(memory.to_keys.state_dict())
    for layer, lag in ((memory.to_queries, 0), (memory.to_keys, 1), (memory.to_values, 0)):
        for module in layer.modules():
            if isinstance(module, CausalConvolution):
                module.weight.abs_().mul_(OTHER_TOKENS)
                module.weight[min(lag, len(module.weight) - 1)] += 1.0


def lookback_of(memory: NeuralMemory) -> int:
    """How many tokens before it a query depends on."""
    return (memory.options.conv_size or 1) - 1
