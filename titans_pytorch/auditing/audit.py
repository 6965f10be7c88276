"""Does a sequence module keep its promises?  `audit` answers in numbers, for any module, ours or anybody's.

    report = audit(NeuralMemory(dim=16), torch.randn(2, 24, 16), stream=stream_with_state, window=0)
    print(report)       # readable, one line per question
    report.check()      # for pytest: AssertionError with that text if anything failed

The module is copied to float64 and its parameters are disturbed a little, so that paths which start at zero are alive
and a difference of 1e-9 means something. Every number is the largest absolute change of an output, relative to the root
mean square of all outputs (a slope: relative to the largest). Train or eval mode is kept: audit the one you run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titans_pytorch.auditing.questions import (
    MOST_POSITIONS,
    Padded,
    Stream,
    default_splits,
    futures,
    gradients,
    judged,
    paddings,
    pieces,
    reach,
    rows,
    sample,
)
from titans_pytorch.auditing.report import AuditReport, Finding
from titans_pytorch.auditing.subject import Forward, prepared
from titans_pytorch.checks.value_checks import check_positive

__all__ = ["AuditReport", "Finding", "audit", "padded_with_mask", "stream_with_state"]

LATER = "do outputs depend on later tokens?"
ROWS = "do outputs depend on other rows of the batch?"
PIECES = "does feeding pieces differ from feeding all?"
PADDING = "does padding leave a trace?"

UNFIT = (torch.bool, torch.complex64, torch.complex128)  # as inputs


def audit(
    module: nn.Module,
    inputs: Tensor,
    *,
    forward: Forward | None = None,
    stream: Stream | None = None,
    padded: Padded | None = None,
    window: int | None = None,
    num_tokens: int | None = None,
    splits: Sequence[Sequence[int]] | None = None,
    poison: bool = True,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> AuditReport:
    """Look for outputs that see later tokens, other rows or the cuts of a stream, and for a memory without effect.

    Args:
        inputs: (b t ...) floats, or ids below `num_tokens`; a lone row gets a second one for company
        forward: (module, inputs) -> outputs (b t ...); by default calls the module and takes the first of a tuple
        stream: (module, piece, state) -> (outputs of the piece, state), state None at first, see `stream_with_state`
        padded: (module, inputs, mask) -> outputs, the mask (b t) being False at padding, wherever it is in a row, see
            `padded_with_mask`; a row's outputs at its own tokens have to be those of these tokens alone
        window: how many tokens back the module sees without its memory, which has to change outputs beyond that
        splits: the lengths of the pieces to feed; by default single tokens, uneven and random pieces
        poison: also put NaN into later tokens, and note where it spoils earlier outputs
    """
    check_arguments(module, inputs, num_tokens, window, splits, tolerance)
    generator, count = torch.Generator().manual_seed(seed), inputs.shape[1]
    with torch.random.fork_rng([inputs.device] if inputs.is_cuda else []):
        subject = prepared(module, inputs, forward or first_output, num_tokens, tolerance, generator)
        cuts = [index + 1 for index in reversed(sample(count - 1, MOST_POSITIONS, generator))]
        replaced = futures(subject, cuts, subject.others, "replaced")
        absent = futures(subject, cuts, subject.others[:, :0], "absent")
        streamed = () if stream is None else pieces(subject, stream, splits or default_splits(count, generator))
        findings: tuple[Finding, ...] = (
            judged("future", LATER, replaced, tolerance),
            judged("gradient", LATER, gradients(subject, cuts), tolerance),
            judged("prefix", LATER, absent, tolerance),
            judged("batch", ROWS, rows(subject), tolerance),
            judged("pieces", PIECES, streamed, tolerance, needs="stream"),
            reach(subject, window, tolerance),
        )
        if padded is not None:
            findings += (judged("padding", PADDING, paddings(subject, padded), tolerance),)
        if poison and inputs.is_floating_point():
            spoiled = futures(subject, cuts, torch.full_like(subject.others, math.nan), "NaN")
            if (finding := judged("poison", LATER, spoiled, tolerance)).passed is False:
                subject.notes.setdefault("NaN", finding.detail)
    shape = " ".join(map(str, inputs.shape))
    return AuditReport(f"{type(module).__name__} on ({shape})", findings, tuple(subject.notes.values()))


def stream_with_state(module: nn.Module, piece: Tensor, state: Any) -> tuple[Tensor, Any]:
    """A `stream` for modules that are called as `module(piece, state=state) -> (outputs, state)`, like NeuralMemory."""
    outputs, state, *_ = module(piece, state=state)
    return outputs, state


def padded_with_mask(module: nn.Module, inputs: Tensor, mask: Tensor) -> Tensor:
    """A `padded` for modules that are called as `module(inputs, attention_mask=mask)`, like language models here."""
    outputs = module(inputs, attention_mask=mask)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def first_output(module: nn.Module, inputs: Tensor) -> Tensor:
    """What a module answers, which may come with a state."""
    outputs = module(inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def check_arguments(
    module: object,
    inputs: Tensor,
    num_tokens: int | None,
    window: int | None,
    splits: Sequence[Sequence[int]] | None,
    tolerance: float,
) -> None:
    """Refuse what no audit can be made of."""
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
