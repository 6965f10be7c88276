"""Where low-rank adapters go in a model: names for `peft.LoraConfig(target_modules=...)`."""

from __future__ import annotations

from torch import nn

from titans_pytorch.attention.segmented import SegmentedAttention
from titans_pytorch.checks import value_checks
from titans_pytorch.layers.feed_forward import SwiGLU
from titans_pytorch.mac.layer import MACLayer
from titans_pytorch.neural_memory import NeuralMemory
from titans_pytorch.titans.attention import Attention

PARTS = ("attention", "memory", "gates", "feed_forward")
GATES = ("to_adaptive_step", "to_decay_factor", "to_momentum")


def lora_targets(model: nn.Module, *parts: str) -> list[str]:
    """Names of the linear layers in some parts of a model.

        peft.get_peft_model(model, peft.LoraConfig(target_modules=lora_targets(model, "attention", "memory")))

    What a memory holds cannot be adapted this way: it is no linear layer, and is trained whole by
    modules_to_save=["memory"].

    Args:
        model: with parts of this library
        parts: "attention"; "memory", how it is written and read (queries, keys, values, what joins heads); "gates",
            how fast it learns and forgets; "feed_forward"
    """
    if not parts:
        raise ValueError(f"parts must be at least one of {', '.join(PARTS)}, got none")
    for part in parts:
        value_checks.check_choice("parts", part, PARTS)
    owners: dict[str, str] = {}
    for name, module in model.named_modules():
        if (owner := part_of(module)) is not None:
            owners[name] = owner
        if isinstance(module, MACLayer):
            owners |= {
                f"{name}.{number}": "feed_forward" for number, each in module.named_children() if each is module.ff
            }
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in found if owned_by(name, owners) in parts]


def part_of(module: nn.Module) -> str | None:
    """The part that a module is, if it is one."""
    if isinstance(module, NeuralMemory):
        return "memory"
    if isinstance(module, (SegmentedAttention, Attention)):
        return "attention"
    return "feed_forward" if isinstance(module, SwiGLU) else None


def owned_by(name: str, owners: dict[str, str]) -> str | None:
    """The part that a layer belongs to; gates are within memories."""
    path = name.split(".")
    for length in range(len(path), 0, -1):
        if (part := owners.get(".".join(path[:length]))) is not None:
            return "gates" if part == "memory" and path[length] in GATES else part
    return None
