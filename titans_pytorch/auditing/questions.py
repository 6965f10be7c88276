"""The questions of an audit: what is done to a module's inputs, how its outputs then change, and what that means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from titans_pytorch.auditing.report import Finding
from titans_pytorch.auditing.subject import Subject, largest, per_token

Stream = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]]
"""(module, piece, state) -> (outputs of the piece, state), state None at first"""

Padded = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(module, inputs, mask) -> outputs, the mask (b t) being False at padding"""

Trace = tuple[str, Tensor]
"""What was done, and how much each output then changed: (b t)"""

REACH = "does the memory have an effect beyond the window?"
MOST_POSITIONS, MOST_ROWS = 64, 8  # longer sequences and larger batches are sampled


def sample(count: int, most: int, generator: Generator) -> list[int]:
    """`range(count)`, or `most` of it in order: both ends and a random choice between them."""
    if count <= most:
        return list(range(count))
    inner = torch.randperm(count - 2, generator=generator)[: most - 2] + 1
    return [0, *inner.sort().values.tolist(), count - 1]


def futures(subject: Subject, cuts: list[int], later: Tensor, how: str) -> Iterator[Trace]:
    """Outputs before a cut, when the tokens behind it are replaced by those of `later`, if any.  later: (b t' ...)"""
    for cut in cuts:
        mixed = torch.cat((subject.inputs[:, :cut], later[:, cut:]), dim=1)
        if (outputs := subject.attempt(f"later tokens that are {how}", mixed)) is not None:
            change = subject.changes(outputs[:, :cut], subject.clean[:, :cut])
            yield f"when tokens from {cut} on are {how}", change


def gradients(subject: Subject, cuts: list[int]) -> Iterator[Trace]:
    """Slopes of all outputs before a cut along the tokens behind it, relative to the largest along any token."""
    if not subject.inputs.is_floating_point():
        return
    with torch.enable_grad():
        inputs = subject.inputs.detach().requires_grad_()
        outputs = subject.forward(subject.module, inputs)
    if not outputs.requires_grad:
        return
    probe = torch.randn(outputs.shape, generator=subject.generator, dtype=torch.float64).to(outputs)
    for cut in cuts:
        weight = torch.cat((probe[:, :cut], torch.zeros_like(probe[:, cut:])), dim=1)
        (slope,) = torch.autograd.grad(outputs, inputs, weight, retain_graph=True, materialize_grads=True)
        leak = largest(slope)[:, cut:] / slope.abs().nan_to_num().max().clamp_min(torch.finfo(slope.dtype).tiny)
        change = torch.zeros_like(leak[:, :1].expand(-1, cut))
        change[:, -1] = leak.amax(1)
        yield f"per change of token {cut + int(leak.amax(0).argmax())}", change


def rows(subject: Subject) -> Iterator[Trace]:
    """Outputs of one row, when the others are replaced, and when there are none."""
    for row in sample(len(subject.inputs), MOST_ROWS, subject.generator):
        mine = slice(row, row + 1)
        mixed = subject.others.clone()
        mixed[mine] = subject.inputs[mine]
        change = subject.changes(subject.answer(mixed)[mine], subject.clean[mine])
        yield f"in row {row} when the other rows are replaced", change
        if (alone := subject.attempt("a single row", subject.inputs[mine])) is not None:
            yield f"in row {row} when it is fed alone", subject.changes(alone, subject.clean[mine])


def default_splits(count: int, generator: Generator) -> list[tuple[int, ...]]:
    """Lengths of pieces to feed: everything at once, single tokens, uneven and random ones."""
    third = max(count // 3, 1)
    splits = [(count,), (1,) * count, (1, count - 1), (count - 1, 1), (third, count - third)]
    for _ in range(3):
        inner = torch.rand(count - 1, generator=generator).lt(0.3).nonzero().flatten() + 1
        splits.append(tuple(stop - start for start, stop in itertools.pairwise([0, *inner.tolist(), count])))
    return list(dict.fromkeys(splits))


def pieces(subject: Subject, stream: Stream, splits: Sequence[Sequence[int]]) -> Iterator[Trace]:
    """Streamed outputs beside those of one call; from a piece that raises on, the change counts as infinite."""
    for lengths in splits:
        label = "when fed in pieces of " + "+".join(map(str, lengths[:8])) + ("+..." if len(lengths) > 8 else "")
        fed, state, start = torch.full_like(subject.clean, math.nan), None, 0
        try:
            for length in lengths:
                piece = subject.inputs[:, start : start + length]
                outputs, state = stream(subject.module, piece, state)
                fed[:, start : start + length] = per_token(outputs, piece)
                start += length
        except Exception as error:
            label = f"{label}, which raises {error!r}"
        yield label, subject.changes(fed, subject.clean)


def masks(batch: int, count: int, generator: Generator) -> Iterator[tuple[str, Tensor]]:
    """Padding of different kinds, another number of tokens in every row.  (b t)"""
    fewer = 1 + (torch.arange(batch) + count // 3) % max(count // 2, 1)
    place = torch.arange(count)
    yield "on the left", place >= fewer[:, None]
    yield "on the right", place < count - fewer[:, None]
    yield "inside", (place < count // 3) | (place >= count // 3 + fewer[:, None])
    drawn = torch.rand(batch, count, generator=generator) < 0.6
    yield "anywhere", drawn | (place == count // 2)


def paddings(subject: Subject, padded: Padded) -> Iterator[Trace]:
    """Outputs at the tokens of padded rows beside those of the same tokens alone."""
    batch, count = subject.inputs.shape[:2]
    for kind, mask in masks(batch, count, subject.generator):
        mask = mask.to(subject.inputs.device)
        mixed, alone = subject.others.clone(), torch.full_like(subject.clean, math.nan)
        for row, own in enumerate(mask):
            tokens = subject.inputs[row, : int(own.sum())]
            mixed[row, own] = tokens
            alone[row, own] = subject.answer(tokens[None])[0]
        label = f"with padding {kind}"
        try:
            outputs = per_token(padded(subject.module, mixed, mask), mixed)
        except Exception as error:
            label, outputs = f"{label}, which raises {error!r}", torch.full_like(alone, math.nan)
        yield label, torch.where(mask, subject.changes(outputs, alone), 0.0)


def judged(name: str, question: str, traces: Iterable[Trace], tolerance: float, needs: str = "") -> Finding:
    """Nothing may change: the largest change in all traces, and the first output that changes beyond the tolerance.

    needs: the argument without which there are no traces
    """
    value, position, detail = None, None, f"not checked, which needs {needs}=" if needs else "not checked"
    for label, change in traces:
        value = max(value or 0.0, change.max().item())
        changed = (change > tolerance).any(0).nonzero().flatten()
        if len(changed) and (position is None or changed[0] < position):
            position = int(changed[0])
            detail = f"output {position} changes by {change[:, position].max():.1e} {label}"
    if value is None:
        return Finding(name, question, None, None, None, detail)
    if position is None:
        detail = "no, bitwise" if value == 0 else "no, within tolerance"
    return Finding(name, question, value, position, position is None, detail)


def reach(subject: Subject, window: int | None, tolerance: float) -> Finding:
    """Something has to change: some token must move an output more than `window` behind it."""
    if window is None:
        return Finding("memory", REACH, None, None, None, "not checked, which needs window=")
    value, furthest, first = 0.0, 0, window + 1
    for token in sample(subject.inputs.shape[1] - first, MOST_POSITIONS, subject.generator):
        mixed = subject.inputs.clone()
        mixed[:, token] = subject.others[:, token]
        change = subject.changes(subject.answer(mixed), subject.clean)[:, token + first :].amax(0)
        value = max(value, change.max().item())
        if len(seen := (change > tolerance).nonzero().flatten()):
            furthest = max(furthest, first + int(seen[-1]))
    if furthest:
        return Finding("memory", REACH, value, None, True, f"yes, up to {furthest} tokens away (window {window})")
    return Finding("memory", REACH, value, first, False, f"no, nothing sees more than {window} tokens back")
