"""How modules begin, once more: for those that were made without storage, as large models are.

    with torch.device("meta"):
        model = TitansMAG(32_000, config)
    model.to_empty(device="cuda")
    reset_parameters(model)                 # the numbers that the constructors draw from the same seed

Every module that owns parameters has a `reset_parameters` of its own, which sets them in place and works in any order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["reset_parameters", "write"]


@torch.no_grad()
def reset_parameters(model: nn.Module, only: Iterable[Tensor] | None = None) -> None:
    """Set the parameters of a module, and of all modules in it, as their constructors do.

    From one seed it draws what the constructors draw, bit for bit in float32 on the same kind of device. Of a model
    that FSDP2 has sharded, every process draws each tensor whole, one module at a time, and keeps its part: all
    processes need the same seed.

    only: the parameters to be set; others keep their values, as those that a checkpoint had
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if on_meta := [name for name, p in model.named_parameters() if p.is_meta]:
        raise ValueError(
            f"model must have storage before its parameters are set, got {on_meta[0]} on the meta device: "
            "call to_empty(device=...) first"
        )
    wanted = None if only is None else {id(parameter) for parameter in only}
    done: set[int] = set()
    modules: list[Any] = list(model.modules())
    for module in modules:
        if has_start(module):
            with made_whole(module, wanted, done):
                module.reset_parameters()
    for name, parameter in model.named_parameters():
        is_wanted = wanted is None or id(parameter) in wanted
        if is_wanted and parameter.numel() > 0 and id(parameter) not in done:
            owner = model.get_submodule(name.rpartition(".")[0])
            raise ValueError(
                f"every module that owns parameters must have reset_parameters(), got {type(owner).__name__} "
                f"without, which owns {name}"
            )


@torch.no_grad()
def write(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter in place; of a sharded one every process keeps its part of the whole value."""
    value = whole_of(value)
    if not is_sharded(parameter):
        parameter.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = parameter
    own = sharded.to_local()
    value = value.to(own.device, own.dtype).contiguous()
    part: Any = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    own.copy_(part.to_local())


def whole_of(tensor: Tensor) -> Tensor:
    """The whole of a tensor, cut from its graph; if it is sharded, all processes have to take part."""
    detached: Any = tensor.detach()
    whole: Tensor = detached.full_tensor() if is_sharded(tensor) else detached
    return whole


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a `DTensor`, of which this process has a part."""
    return hasattr(tensor, "placements") and hasattr(tensor, "to_local")


def has_start(module: nn.Module) -> bool:
    """Whether a module can set what it owns."""
    return callable(getattr(module, "reset_parameters", None))


@contextmanager
def made_whole(module: nn.Module, wanted: set[int] | None, done: set[int]) -> Iterator[None]:
    """While a module sets its parameters, sharded ones are whole, and for those that are to be kept others stand in.

    done: takes up which parameters have been set
    """
    slots = [
        (owner, name, parameter)
        for owner in dict.fromkeys(set_by(module))
        for name, parameter in owner._parameters.items()
        if parameter is not None
    ]
    stand_ins: list[Tensor] = []
    for owner, name, parameter in slots:
        is_kept = wanted is not None and id(parameter) not in wanted
        if is_kept or is_sharded(parameter):
            device = parameter.to_local().device if is_sharded(parameter) else parameter.device  # type: ignore[attr-defined]
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            owner._parameters[name] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        stand_ins.append(owner._parameters[name])  # type: ignore[arg-type]
    before = [version(tensor) for tensor in stand_ins]
    try:
        yield
    finally:
        for owner, name, parameter in slots:
            owner._parameters[name] = parameter
    for (_, _, parameter), tensor, number in zip(slots, stand_ins, before, strict=True):
        if version(tensor) == number and not tensor.is_inference():
            continue
        done.add(id(parameter))
        if tensor is not parameter and (wanted is None or id(parameter) in wanted):
            write(parameter, tensor)


def version(tensor: Tensor) -> int:
    """How often a tensor has been changed in place; one of inference mode does not say."""
    return 0 if tensor.is_inference() else tensor._version


def set_by(module: nn.Module) -> Iterator[nn.Module]:
    """Modules whose parameters a module may set: itself, what is below it and cannot, and what begins as it does."""
    yield module
    for child in module.children():
        if not has_start(child):
            yield from set_by(child)
    yield from getattr(module, "followers", ())
