"""One model over many processes: what is shared out, and how it comes together again for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from titans_pytorch.initialization import whole_of


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """FSDP2: each of `model.layers`, and what is around them, is a unit that is gathered when it is needed."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    model.to(device)
    layers: Any = model.layers
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # in place
    register_fsdp_forward_method(model, "logits_and_state")  # by which states are carried
    return model


def gathered(tensor: Tensor) -> Tensor:
    """The whole of it, on the CPU.  All processes have to take part."""
    return whole_of(tensor).cpu().contiguous()


def model_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: gathered(each) for name, each in model.state_dict().items()}


def optimizer_state(model: nn.Module, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    """Every optimizer's memory of every parameter, by the parameter's name: the same on any number of processes."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}:{key}": gathered(value)
        for optimizer in optimizers
        for parameter, kept in optimizer.state.items()
        for key, value in kept.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_state(model: nn.Module, optimizers: Iterable[Optimizer], saved: Mapping[str, Tensor]) -> None:
    by_name: dict[str, dict[str, Tensor]] = {}
    for full_name, value in saved.items():
        name, _, key = full_name.rpartition(":")
        by_name.setdefault(name, {})[key] = value
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                kept = by_name.get(names[parameter], {})
                optimizer.state[parameter] = {key: placed(value, parameter) for key, value in kept.items()}


def placed(value: Tensor, parameter: Tensor) -> Tensor:
    """Where its parameter is, and shared out like it; counts of steps stay on the CPU."""
    if value.ndim == 0 and parameter.ndim > 0:
        return value
    if isinstance(parameter, DTensor):
        whole = value.to(parameter.device_mesh.device_type)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value.to(parameter.device)
