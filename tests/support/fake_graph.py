"""CUDA graphs without CUDA: operations are noted with the memory they work on, and repeated on the same memory.

What is true of a graph is true of them: results stay where they are, numbers of the host stay what they were, and
nothing has happened once a step is captured. What a graph refuses is refused: a look at a value, a tensor of numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from titans_pytorch.fast_weights.loop import limits

Result = TypeVar("Result")

REFUSED = {"_local_scalar_dense", "nonzero", "lift_fresh", "is_nonzero", "masked_select", "equal", "unique"}
"""Operations that wait for the device or take numbers from the host"""


class FakeGraphs:
    """Records graphs of operations on the CPU; how often it was asked for what is counted."""

    def __init__(self) -> None:
        self.num_warm_ups, self.num_graphs, self.num_replays = 0, 0, 0

    def warm_up(self, run: Callable[[], Result]) -> Result:
        self.num_warm_ups += 1
        return run()

    def record(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        graph = Notes()
        self.num_graphs += 1
        with graph, patch.object(limits, "FREE_TO_LOOK", set()):
            result = run()
        graph.undo()

        def replay() -> None:
            self.num_replays += 1
            graph.replay()

        return result, replay


class Notes(TorchDispatchMode):
    """All operations on tensors, in order, with what they were given and what they gave."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.made: set[int] = set()  # storages that came to be while it was recorded
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what was changed in older ones, as it was

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if op.overloadpacket.__name__ in REFUSED or takes_a_mask(op, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {op}")
        for tensor in changed_by(op, args, kwargs):
            if storage(tensor) not in self.made and storage(tensor) not in self.before:
                self.before[storage(tensor)] = (tensor, tensor.clone())
        result = op(*args, **kwargs)
        given = {storage(each) for each in tensors((args, kwargs))}
        self.made |= {storage(each) for each in tensors(result)} - given
        self.operations.append((op, args, kwargs, result))
        return result

    @torch.no_grad()
    def undo(self) -> None:
        """Put everything back that was there before: to capture is not to run."""
        for tensor, earlier in self.before.values():
            tensor.copy_(earlier)

    @torch.no_grad()
    def replay(self) -> None:
        for op, args, kwargs, result in self.operations:
            given = {storage(each) for each in tensors((args, kwargs))}
            fresh = op(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(fresh), strict=True):
                if storage(old) not in given:  # neither a view nor changed in place
                    old.copy_(new)


def takes_a_mask(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether how much an operation gives depends on values."""
    indices = args[1] if op.overloadpacket.__name__ in ("index", "index_put", "index_put_") else ()
    return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in indices)


def changed_by(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operation changes in place."""
    arguments = op._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    written = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return tensors([given[name] for name in written if name in given])


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
