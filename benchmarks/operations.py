"""How many operations something takes, as a device would be asked for them, and how many bytes it holds at most.

Views cost nothing and do not count. Both are exact, and the same on any machine.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

VIEWS = {
    "_reshape_alias",
    "_unsafe_view",
    "alias",
    "as_strided",
    "detach",
    "diagonal",
    "expand",
    "lift_fresh",
    "permute",
    "select",
    "slice",
    "split",
    "split_with_sizes",
    "squeeze",
    "t",
    "transpose",
    "unbind",
    "unfold",
    "unsqueeze",
    "view",
}


class Counting(TorchDispatchMode):
    """Counts operations while it is entered, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ not in VIEWS:
            self.note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def note(self, func: Any, args: Any, kwargs: Any) -> None:
        """An operation that is about to run."""
        self.count += 1


def operations(run: Callable[[], Any]) -> int:
    """Operations of a second run, by which what is made once and kept has been made."""
    run()
    with Counting() as counting:
        run()
    return counting.count


class Holding(TorchDispatchMode):
    """Follows the storages that operations give, as long as anything keeps them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.most = 0  # bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.hold(tensor.untyped_storage())
        return found

    def hold(self, storage: Any) -> None:
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.release, storage._cdata)

    def release(self, number: int) -> None:
        self.now -= self.sizes.pop(number)


def held_bytes(run: Callable[[], Any]) -> int:
    """Most bytes alive at once in a second run: of what operations gave, and of what they gave views of."""
    run()
    with Holding() as holding:
        run()
    return holding.most
