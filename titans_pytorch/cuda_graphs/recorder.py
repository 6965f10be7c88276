"""What a captured step is made of: a recorder of graphs, and memory that stays where it is for what a step is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")


class Recorder(Protocol):
    """What makes a graph of a function that reads and writes memory which stays where it is."""

    def warm_up(self, run: Callable[[], Result]) -> Result:
        """Run a function where it is going to be captured."""

    def record(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        """Capture a function.  -> its results, in memory of the graph, and what fills them by running it again"""


class CudaGraphs:
    """Records CUDA graphs on one device, which share the memory between them and run in the order of their capture."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool: Any = None

    def warm_up(self, run: Callable[[], Result]) -> Result:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = run()
        current.wait_stream(self.stream)
        return result

    def record(self, run: Callable[[], Result]) -> tuple[Result, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                result = run()
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            raise RuntimeError(
                f"a captured step must neither look at the values of tensors nor make tensors of numbers: {reason}"
            ) from error
        self.pool = graph.pool()
        return result, graph.replay


class Buffers:
    """Memory that stays where it is, for the tensors that a captured step is given."""

    def __init__(self, examples: Sequence[Tensor]) -> None:
        for place, example in enumerate(examples):
            check_tensor(f"example {place}", example)
            if torch.is_autocast_enabled(example.device.type):
                raise ValueError("a captured step must enter autocast itself, got autocast around its capture")
        self.tensors = [example.detach().clone() for example in examples]

    def recorder(self) -> Recorder:
        """The recorder of the device that the examples are on."""
        if not self.tensors:
            raise ValueError("a captured step must be given at least one example tensor, got none")
        if not torch.cuda.is_available():
            raise ValueError("a captured step needs a CUDA device, got a machine without one")
        for place, buffer in enumerate(self.tensors):
            if not buffer.is_cuda:
                raise ValueError(f"example {place} must be on a CUDA device, got one on {buffer.device}")
        return CudaGraphs(self.tensors[0].device)

    def fill(self, given: Sequence[Tensor]) -> None:
        """Copy in what a call is given."""
        if len(given) != len(self.tensors):
            raise ValueError(f"a captured step must be given {len(self.tensors)} tensor(s), got {len(given)}")
        for place, (buffer, tensor) in enumerate(zip(self.tensors, given, strict=True)):
            check_tensor(f"argument {place}", tensor)
            if (tensor.shape, tensor.dtype) != (buffer.shape, buffer.dtype):
                raise ValueError(
                    f"argument {place} must be like its example, {tuple(buffer.shape)} of {buffer.dtype}, "
                    f"got {tuple(tensor.shape)} of {tensor.dtype}"
                )
            buffer.copy_(tensor, non_blocking=True)


def check_tensor(name: str, given: Any) -> None:
    """A tensor that no gradient is wanted of, as a graph has none of what is outside of it."""
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
    if given.requires_grad:
        raise ValueError(f"{name} must not require a gradient, which a captured step cannot hand on")
