"""A step of fixed shapes, forward, backward and optimizer, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from titans_pytorch.attention.masks import KEPT
from titans_pytorch.cuda_graphs.recorder import Buffers, Recorder

Result = TypeVar("Result")

WARM_UPS = 3
"""Runs before a step is captured: kernels are loaded, workspaces made, gradients and optimizer states there"""


class CapturedStep(Generic[Result]):
    """A step that was captured: called with tensors like the examples, it fills their memory and replays."""

    def __init__(self, buffers: Buffers, results: Result, replay: Callable[[], None]) -> None:
        self.buffers, self.results, self.replay = buffers, results, replay
        self.masks = tuple(KEPT.masks.values())  # those that the graph reads have to live as long as it does

    def __call__(self, *given: Tensor) -> Result:
        self.buffers.fill(given)
        self.replay()
        return cast(Result, tree_map_only(Tensor, Tensor.clone, self.results))


def captured(
    step: Callable[..., Result],
    *examples: Tensor,
    changes: Iterable[nn.Module | Optimizer] = (),
    recorder: Recorder | None = None,
) -> CapturedStep[Result]:
    """A step as one CUDA graph: called with tensors like the examples, it gives what `step` gives, as copies.

        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(1e-3, device="cuda"), capturable=True)

        def step(ids):
            optimizer.zero_grad()
            loss = model.loss(ids)
            loss.backward()
            optimizer.step()
            return loss

        train = captured(step, ids, changes=(model, optimizer))
        loss = train(other_ids)

    The step runs a few times before it is captured, on the examples.

    Args:
        changes: modules and optimizers that the step changes; they are put back to what they were before it ran
        recorder: what captures, for tests; None: CUDA
    """
    buffers = Buffers(examples)
    recorder = buffers.recorder() if recorder is None else recorder
    before = [saved(each) for each in changes]

    def run() -> Result:
        return cast(Result, tree_map_only(Tensor, Tensor.detach, step(*buffers.tensors)))

    for _ in range(WARM_UPS):
        recorder.warm_up(run)
    results, replay = recorder.record(run)
    for restore in before:
        restore()
    return CapturedStep(buffers, results, replay)


def saved(changed: nn.Module | Optimizer) -> Callable[[], None]:
    """What a module or an optimizer is now, as something that puts it back in the memory where it then is."""
    before = {key: tensor.detach().clone() for key, tensor in tensors_of(changed)}

    @torch.no_grad()
    def restore() -> None:
        for key, tensor in tensors_of(changed):
            if key in before:
                tensor.copy_(before[key])
            else:  # gradients and states that were not there yet: all of torch's begin at zero
                tensor.zero_()

    return restore


def tensors_of(changed: nn.Module | Optimizer) -> Iterator[tuple[Any, Tensor]]:
    """What a step can change, under keys that stay."""
    if isinstance(changed, Optimizer):
        check_capturable(changed)
        return optimizer_tensors(changed)
    if isinstance(changed, nn.Module):
        return module_tensors(changed)
    raise TypeError(f"changes must be modules and optimizers, got {type(changed).__name__}")


def module_tensors(module: nn.Module) -> Iterator[tuple[Any, Tensor]]:
    """Parameters, their gradients and buffers by name."""
    for name, parameter in module.named_parameters():
        yield name, parameter
        if parameter.grad is not None:
            yield (name, "grad"), parameter.grad
    yield from module.named_buffers()


def optimizer_tensors(optimizer: Optimizer) -> Iterator[tuple[Any, Tensor]]:
    """What an optimizer remembers of every parameter."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor):
                yield (id(parameter), name), value


def check_capturable(optimizer: Optimizer) -> None:
    """An optimizer counts its steps where the graph can."""
    if not all(group.get("capturable", True) for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer must be made with capturable=True to be captured, got {type(optimizer).__name__} with False"
        )
