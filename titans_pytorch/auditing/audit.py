"""Does a sequence module keep its promises?  `audit` answers in numbers, for any module, ours or anybody's.

    report = audit(NeuralMemory(dim=16), torch.randn(2, 24, 16), stream=stream_with_state, window=0)
    print(report)       # readable, one line per question
    report.check()      # for pytest: AssertionError with that text if anything failed

The module is copied to float64 and its parameters are disturbed a little, so that paths which start at zero are alive
and a difference of 1e-9 means something. Every number is the largest absolute change of an output, relative to the root
mean square of all outputs (a slope: relative to the largest). Train or eval mode is kept: audit the one you run.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor, nn

from titans_pytorch.auditing.report import AuditReport, Finding
from titans_pytorch.checks.value_checks import check_positive

__all__ = ["AuditReport", "Finding", "audit", "stream_with_state"]

Forward = Callable[[nn.Module, Tensor], Tensor]
Stream = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]]
Trace = tuple[str, Tensor]  # what was done, and how much each output then changed: (b t)

LATER = "do outputs depend on later tokens?"
ROWS = "do outputs depend on other rows of the batch?"
PIECES = "does feeding pieces differ from feeding all?"
REACH = "does the memory have an effect beyond the window?"

MOST_POSITIONS, MOST_ROWS = 64, 8  # longer sequences and larger batches are sampled
UNFIT = (torch.bool, torch.complex64, torch.complex128)  # as inputs
NOISE = 0.1  # on parameters and inputs, relative to their own size


def audit(
    module: nn.Module,
    inputs: Tensor,
    *,
    forward: Forward | None = None,
    stream: Stream | None = None,
    window: int | None = None,
    num_tokens: int | None = None,
    splits: Sequence[Sequence[int]] | None = None,
    poison: bool = True,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> AuditReport:
    """Look for outputs that see later tokens, other rows or the cuts of a stream, and for a memory without effect.

    inputs: (b t ...) floats, or ids below `num_tokens`; a lone row gets a second one for company
    forward: (module, inputs) -> outputs (b t ...); by default calls the module and takes the first of a tuple
    stream: (module, piece, state) -> (outputs of the piece, state), state None at first, see `stream_with_state`
    window: how many tokens back the module sees without its memory, which has to change outputs beyond that
    splits: the lengths of the pieces to feed; by default single tokens, uneven and random pieces
    poison: also put NaN into later tokens, and note where it spoils earlier outputs
    """
    _check(module, inputs, num_tokens, window, splits, tolerance)
    generator, count = torch.Generator().manual_seed(seed), inputs.shape[1]
    with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
        subject = _prepare(module, inputs, forward or _call, num_tokens, tolerance, generator)
        cuts = [index + 1 for index in reversed(_sample(count - 1, MOST_POSITIONS, generator))]
        replaced = _futures(subject, cuts, subject.others, "replaced")
        absent = _futures(subject, cuts, subject.others[:, :0], "absent")
        streamed = () if stream is None else _pieces(subject, stream, splits or _default_splits(count, generator))
        findings = (
            _judge("future", LATER, replaced, tolerance),
            _judge("gradient", LATER, _gradients(subject, cuts), tolerance),
            _judge("prefix", LATER, absent, tolerance),
            _judge("batch", ROWS, _rows(subject), tolerance),
            _judge("pieces", PIECES, streamed, tolerance),
            _reach(subject, window, tolerance),
        )
        if poison and inputs.is_floating_point():
            spoiled = _futures(subject, cuts, torch.full_like(subject.others, math.nan), "NaN")
            if (finding := _judge("poison", LATER, spoiled, tolerance)).passed is False:
                subject.notes.setdefault("NaN", finding.detail)
    shape = " ".join(map(str, inputs.shape))
    return AuditReport(f"{type(module).__name__} on ({shape})", findings, tuple(subject.notes.values()))


def stream_with_state(module: nn.Module, piece: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A `stream` for modules that are called as `module(piece, state=state) -> (outputs, state)`, like NeuralMemory."""
    outputs, state, *_ = module(piece, state=state)
    return outputs, state


@dataclass(frozen=True)
class _Subject:
    """The disturbed float64 copy, two inputs that differ in every token, and its outputs for the first of them."""

    module: nn.Module
    forward: Forward
    inputs: Tensor
    others: Tensor
    clean: Tensor
    generator: Generator
    notes: dict[str, str] = field(default_factory=dict)

    def answer(self, inputs: Tensor) -> Tensor:
        return _per_token(self.forward(self.module, inputs), inputs)

    def attempt(self, kind: str, inputs: Tensor) -> Tensor | None:
        """The answer to inputs that a module may refuse; that it did is noted once per kind."""
        try:
            return self.answer(inputs)
        except Exception as error:
            self.notes.setdefault(kind, f"refuses {kind}, inputs {tuple(inputs.shape)}: {error!r}")
            return None

    def changes(self, outputs: Tensor, clean: Tensor) -> Tensor:
        """How far each output is off, relative to the size of all clean outputs.  (b t ...) -> (b t)"""
        return _largest(outputs - clean) / _size(self.clean)


def _call(module: nn.Module, inputs: Tensor) -> Tensor:
    outputs = module(inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def _per_token(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Outputs in float64 and without their graph, one per input token.  (b t ...)"""
    if outputs.shape[:2] != inputs.shape[:2]:
        raise ValueError(f"outputs must be (b t ...) like inputs {tuple(inputs.shape)}, got {tuple(outputs.shape)}")
    return outputs.detach().double()


def _largest(values: Tensor) -> Tensor:
    """The largest absolute value per token, NaN counting as infinite.  (b t ...) -> (b t)"""
    return values.abs().nan_to_num(nan=math.inf, posinf=math.inf).reshape(*values.shape[:2], -1).amax(-1)


def _size(values: Tensor) -> Tensor:
    """The root mean square, or 1 where everything is 0."""
    size = values.square().mean().sqrt()
    return torch.where(size > 0, size, 1.0)


def _sample(count: int, most: int, generator: Generator) -> list[int]:
    """`range(count)`, or `most` of it in order: both ends and a random choice between them."""
    if count <= most:
        return list(range(count))
    inner = torch.randperm(count - 2, generator=generator)[: most - 2] + 1
    return [0, *inner.sort().values.tolist(), count - 1]


def _check(
    module: object, inputs: Tensor, num_tokens: int | None, window: int | None, splits: Any, tolerance: float
) -> None:
    check_positive(tolerance=tolerance)
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {type(module).__name__}")
    if inputs.ndim < 2 or inputs.numel() == 0 or inputs.shape[1] < 2 or inputs.dtype in UNFIT:
        raise ValueError(f"inputs must be floats or ids (b t ...), t > 1, got {inputs.dtype} {tuple(inputs.shape)}")
    if inputs.is_floating_point() != (num_tokens is None):
        raise ValueError(f"num_tokens belongs to integer ids, got {num_tokens} with inputs of {inputs.dtype}")
    if num_tokens is not None and (num_tokens < 2 or inputs.min() < 0 or inputs.max() >= num_tokens):
        raise ValueError(f"ids must lie below num_tokens, at least 2, got ids to {inputs.max()} and {num_tokens}")
    count = inputs.shape[1]
    if window is not None and not 0 <= window < count - 1:
        raise ValueError(f"window must be in 0..{count - 2}, to leave some of {count} tokens behind it, got {window}")
    if wrong := [tuple(lengths) for lengths in splits or () if sum(lengths) != count or min(lengths) < 1]:
        raise ValueError(f"splits must be positive lengths that sum to {count} tokens, got {wrong[0]}")


def _prepare(
    module: nn.Module, inputs: Tensor, forward: Forward, num_tokens: int | None, tolerance: float, generator: Generator
) -> _Subject:
    """Copy and disturb the module and the inputs; refuse what no question can be asked about."""

    def noise(like: Tensor) -> Tensor:
        return _size(like) * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    module = copy.deepcopy(module).double()
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point():
                parameter.add_(NOISE * noise(parameter))
    if num_tokens is None:
        inputs = inputs.detach().double()
        inputs = inputs + NOISE * noise(inputs)
        others = inputs + noise(inputs)
    else:
        shift = torch.randint(1, num_tokens, inputs.shape, generator=generator).to(inputs.device)
        others = ((inputs + shift) % num_tokens).to(inputs.dtype)
    if len(inputs) == 1:
        inputs, others = torch.cat((inputs, others)), torch.cat((others, inputs))

    clean = _per_token(forward(module, inputs), inputs)
    if not clean.isfinite().all():
        raise ValueError("outputs must be finite to be audited, got NaN or infinity for the given inputs")
    subject = _Subject(module, forward, inputs, others, clean, generator)
    if (off := subject.changes(subject.answer(inputs), clean).max()) > tolerance:
        raise ValueError(f"module must answer the same inputs alike, got a change of {off:.1e}: is dropout on?")
    return subject


def _judge(name: str, question: str, traces: Iterable[Trace], tolerance: float) -> Finding:
    """Nothing may change: the largest change in all traces, and the first output that changes beyond the tolerance."""
    value, position, detail = None, None, "not checked"
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


def _futures(subject: _Subject, cuts: list[int], later: Tensor, how: str) -> Iterator[Trace]:
    """Outputs before a cut, when the tokens behind it are replaced by those of `later`, if any.  later: (b t' ...)"""
    for cut in cuts:
        mixed = torch.cat((subject.inputs[:, :cut], later[:, cut:]), dim=1)
        if (outputs := subject.attempt(f"later tokens that are {how}", mixed)) is not None:
            change = subject.changes(outputs[:, :cut], subject.clean[:, :cut])
            yield f"when tokens from {cut} on are {how}", change


def _gradients(subject: _Subject, cuts: list[int]) -> Iterator[Trace]:
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
        leak = _largest(slope)[:, cut:] / slope.abs().nan_to_num().max().clamp_min(torch.finfo(slope.dtype).tiny)
        change = torch.zeros_like(leak[:, :1].expand(-1, cut))
        change[:, -1] = leak.amax(1)
        yield f"per change of token {cut + int(leak.amax(0).argmax())}", change


def _rows(subject: _Subject) -> Iterator[Trace]:
    for row in _sample(len(subject.inputs), MOST_ROWS, subject.generator):
        mine = slice(row, row + 1)
        mixed = subject.others.clone()
        mixed[mine] = subject.inputs[mine]
        change = subject.changes(subject.answer(mixed)[mine], subject.clean[mine])
        yield f"in row {row} when the other rows are replaced", change
        if (alone := subject.attempt("a single row", subject.inputs[mine])) is not None:
            yield f"in row {row} when it is fed alone", subject.changes(alone, subject.clean[mine])


def _default_splits(count: int, generator: Generator) -> list[tuple[int, ...]]:
    third = max(count // 3, 1)
    splits = [(count,), (1,) * count, (1, count - 1), (count - 1, 1), (third, count - third)]
    for _ in range(3):
        inner = torch.rand(count - 1, generator=generator).lt(0.3).nonzero().flatten() + 1
        splits.append(tuple(stop - start for start, stop in itertools.pairwise([0, *inner.tolist(), count])))
    return list(dict.fromkeys(splits))


def _pieces(subject: _Subject, stream: Stream, splits: Sequence[Sequence[int]]) -> Iterator[Trace]:
    """Streamed outputs beside those of one call; from a piece that raises on, the change counts as infinite."""
    for lengths in splits:
        label = "when fed in pieces of " + "+".join(map(str, lengths[:8])) + ("+..." if len(lengths) > 8 else "")
        fed, state, start = torch.full_like(subject.clean, math.nan), None, 0
        try:
            for length in lengths:
                piece = subject.inputs[:, start : start + length]
                outputs, state = stream(subject.module, piece, state)
                fed[:, start : start + length] = _per_token(outputs, piece)
                start += length
        except Exception as error:
            label = f"{label}, which raises {error!r}"
        yield label, subject.changes(fed, subject.clean)


def _reach(subject: _Subject, window: int | None, tolerance: float) -> Finding:
    """Something has to change: some token must move an output more than `window` behind it."""
    if window is None:
        return Finding("memory", REACH, None, None, None, "not checked")
    value, furthest, first = 0.0, 0, window + 1
    for token in _sample(subject.inputs.shape[1] - first, MOST_POSITIONS, subject.generator):
        mixed = subject.inputs.clone()
        mixed[:, token] = subject.others[:, token]
        change = subject.changes(subject.answer(mixed), subject.clean)[:, token + first :].amax(0)
        value = max(value, change.max().item())
        if len(seen := (change > tolerance).nonzero().flatten()):
            furthest = max(furthest, first + int(seen[-1]))
    if furthest:
        return Finding("memory", REACH, value, None, True, f"yes, up to {furthest} tokens away (window {window})")
    return Finding("memory", REACH, value, first, False, f"no, nothing sees more than {window} tokens back")
