"""Decoding, piece by piece, as CUDA graphs: one for each place in the period of a model's chunks and segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from titans_pytorch.attention.masks import KEPT
from titans_pytorch.checks import value_checks
from titans_pytorch.cuda_graphs.numbers import tensors, whole_numbers, with_numbers
from titans_pytorch.cuda_graphs.recorder import Buffers, Recorder
from titans_pytorch.memory.rows import map_rows

State = TypeVar("State")

TOLERANCE = 1e-4
TOLERANCES = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""How far a replay may be from the step itself, relative: by the dtype of what is compared, else TOLERANCE"""


class CapturedStream(Generic[State]):
    """A model that reads pieces of one length, one after another, as `period` CUDA graphs.

        decode = CapturedStream(model, state, ids[:, :1], period=16)     # ids on a CUDA device
        logits = decode(ids[:, :1])                                      # the piece after those of `state`

    The state stays in the memory of the graphs. What a step does may depend on where it is in a period, as it does on
    chunks, batches and segments, and on nothing else that the host counts. The first period captures; in the second,
    replays are compared with the step itself, and an answer that differs is refused.

    Args:
        step: (pieces, state) -> (outputs, next state), with no effect beside; without a gradient
        state: of the tokens so far; shapes must be those of a period later
        examples: tensors like those that are to come
        period: calls after which a memory's chunks and batches, and the segments of attention, begin alike
        recorder: what captures, for tests; None: CUDA
    """

    def __init__(
        self,
        step: Callable[..., tuple[Any, State]],
        state: State,
        *examples: Tensor,
        period: int,
        recorder: Recorder | None = None,
    ) -> None:
        value_checks.check_whole(period=period)
        self.buffers = Buffers(examples)
        self.recorder = self.buffers.recorder() if recorder is None else recorder
        self.step, self.period, self.count = step, period, 0
        self.first = state = map_rows(lambda _, tensor: tensor.detach().clone(), state)
        self.states: list[State] = [state]  # by place in the period: memory that stays, numbers of the first period
        self.numbers: list[list[int]] = []  # of the states of the second period
        self.graphs: list[tuple[Any, Callable[[], None]]] = []
        self.masks: tuple[Tensor, ...] = ()

    @torch.no_grad()
    def __call__(self, *given: Tensor) -> Any:
        """The outputs for the next piece, as copies."""
        self.buffers.fill(given)
        place = self.count % self.period
        if self.count < self.period:
            self.capture(place)
            self.graphs[place][1]()
        elif self.count < 2 * self.period:
            self.replay_and_compare(place)
        else:
            self.graphs[place][1]()
        self.count += 1
        return tree_map_only(Tensor, Tensor.clone, self.graphs[place][0])

    @property
    def state(self) -> State:
        """The state after the pieces so far, as a copy."""
        periods, place = divmod(self.count, self.period)
        state = self.states[place]
        if periods > 0:
            both = zip(whole_numbers(state), self.numbers[place], strict=True)
            state = with_numbers(state, [first + periods * (second - first) for first, second in both])
        return map_rows(lambda _, tensor: tensor.clone(), state)

    def capture(self, place: int) -> None:
        """Make the graph of a place; where the period ends, it hands the state back to where it begins."""
        state, is_last = self.states[place], place == self.period - 1
        _, expected = self.recorder.warm_up(lambda: self.run(state))
        if is_last:
            check_returns(self.first, expected, self.period)

        def run() -> tuple[Any, State]:
            outputs, after = self.run(state)
            if is_last:
                copies = [tensor.clone() for tensor in tensors(after)]  # some of them are each other's old places
                for old, new in zip(tensors(self.first), copies, strict=True):
                    old.copy_(new)
            return outputs, after

        (outputs, after), replay = self.recorder.record(run)
        self.graphs.append((outputs, replay))
        if is_last:
            self.numbers.append(list(whole_numbers(after)))
        else:
            self.states.append(after)
        self.masks = tuple(KEPT.masks.values())  # that graphs read have to live as long as they do

    def run(self, state: State) -> tuple[Any, State]:
        """The step itself, on the tensors that were given last; a state without what keeps a whole call alive."""
        outputs, after = self.step(*self.buffers.tensors, state)
        return outputs, map_rows(lambda _, tensor: tensor, after)

    def replay_and_compare(self, place: int) -> None:
        """Replay a graph, and refuse it if the step itself, which knows the position, says something else."""
        numbers = self.numbers[place]
        state = map_rows(lambda _, tensor: tensor.clone(), with_numbers(self.states[place], numbers))
        outputs, expected_after = self.recorder.warm_up(lambda: self.run(state))
        self.graphs[place][1]()
        if place + 1 < self.period:
            self.numbers.append(list(whole_numbers(expected_after)))
        after = self.states[(place + 1) % self.period]
        expected, got = (
            [*leaves(o), *tensors(s)] for o, s in ((outputs, expected_after), (self.graphs[place][0], after))
        )
        if not all(map(are_close, got, expected)):
            raise ValueError(
                f"a step must do the same every period of {self.period} calls, got another answer than the step itself "
                f"on call {self.count + 1}: it depends on the position, as rotary attention over a sliding window does"
            )


def leaves(outputs: Any) -> list[Tensor]:
    """All tensors of what a step gives."""
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]


def check_returns(first: Any, last: Any, period: int) -> None:
    """The state is of the shapes that it began with."""
    before, after = ([tuple(tensor.shape) for tensor in tensors(state)] for state in (first, last))
    if before != after:
        changed = [pair for pair in zip(before, after, strict=False) if pair[0] != pair[1]]
        what = f"{changed[0][0]} became {changed[0][1]}" if changed else f"{len(before)} tensors became {len(after)}"
        raise ValueError(f"state must be of the same shapes after a period of {period} calls, got one where {what}")


def are_close(got: Tensor, expected: Tensor) -> bool:
    """Equal but for rounding."""
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    distance = (got.double() - expected.double()).norm()
    return bool(distance <= TOLERANCES.get(expected.dtype, TOLERANCE) * expected.double().norm())
