"""The loop over renewals with a compiled step: each renewal is one call of `step.renewal` under `torch.compile`.

The step is compiled once for tensors of one shape, in seconds; the loop around it stays plain Python, so its length
does not matter. The gradient is autograd's own, and inductor compiles each step's part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from titans_pytorch.fast_weights.inductor import OPTIONS
from titans_pytorch.fast_weights.loop.parts import Inputs, Results, Shape
from titans_pytorch.fast_weights.loop.renewals import renewals
from titans_pytorch.fast_weights.loop.step import Form, Given, Slots, Stepped, renewal
from titans_pytorch.fast_weights.precision import full_precision
from titans_pytorch.memory_models import NORM_GAIN

MAX_GRAPHS = 64
"""Forms of a step, and shapes of its tensors, that one process may compile; torch gives up after 8 of a function"""


@cache
def compiled_step(device: str) -> Callable[..., Stepped]:
    """`step.renewal` on this kind of device, compiled where it is first called."""
    return torch.compile(renewal, fullgraph=True, dynamic=False, options=OPTIONS.get(device))


def compiled_renewals(shape: Shape, inputs: Inputs) -> Results:
    """All renewals of a loop, as `renewals.renewals` gives them; by that where the step does not know how."""
    if not can_compile(shape, inputs):
        return renewals(shape, inputs)
    steps: list[Stepped] = []
    with full_precision(inputs.tokens.keys), torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
        step, first = compiled_step(inputs.tokens.keys.device.type), first_slots(shape, inputs)
        slots = first
        base = first_base(shape, inputs)
        for n, given in enumerate(given_of_renewals(shape, inputs)):
            steps.append(step(form_of(shape, n), given, base, slots))
            slots, base = steps[-1].slots, None
        return results_of(shape, first, steps)


def can_compile(shape: Shape, inputs: Inputs) -> bool:
    """Whether the step knows what a loop is given: no gated transition, in blocks of one chunk gates for all alike."""
    if inputs.share is not None:
        return False
    is_alike = all(mix.shape[-1] == 1 for mix in inputs.mixes if mix.ndim == 6) and not any(
        share is not None for share in inputs.shares
    )
    return shape.equations is None or is_alike


def names_of(shape: Shape) -> list[str]:
    """All parameters, in the order of `Form.places`."""
    return [*shape.matrices, *(name for name in shape.packing.places if name == NORM_GAIN)]


def form_of(shape: Shape, n: int) -> Form:
    places = shape.packing.places
    matrices = tuple(places[name] for name in shape.matrices)
    return Form(matrices, places.get(NORM_GAIN), shape.per_renewal, shape.equations, shape.renews(n))


def plain(x: Tensor) -> Tensor:
    """A copy that lies in order, so that tensors of one shape have one layout and one graph."""
    return x.clone(memory_format=torch.contiguous_format)


def first_slots(shape: Shape, inputs: Inputs) -> list[Slots]:
    """What the first renewal begins with; all of it has a gradient if anything has, as in the renewals after it."""
    has_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tree_leaves(inputs) if isinstance(t, Tensor))
    found = []
    for name in names_of(shape):
        pack, number, _ = shape.packing.places[name]
        slots = [plain(slot) for slot in inputs.states[pack][number].unbind(1)]
        found.append([slot if slot.requires_grad or not has_grad else slot.requires_grad_() for slot in slots])
    return found


def first_base(shape: Shape, inputs: Inputs) -> list[Tensor] | None:
    if inputs.base is None:
        return None
    places = [shape.packing.places[name] for name in names_of(shape)]
    return [plain(inputs.base[place.pack][place.number]) for place in places]


def given_of_renewals(shape: Shape, inputs: Inputs) -> Iterator[Given]:
    """What each renewal is given, beside weights."""
    num = shape.num_renewals

    def each(table: Tensor) -> tuple[Tensor, ...]:
        """Blocks or renewals first; where there are more blocks than one in a renewal, an axis for them."""
        is_by_block = len(table) == shape.num_blocks and not is_table(table)
        return (table.unflatten(0, (num, -1)) if is_by_block else table).unbind(0)

    def is_table(table: Tensor) -> bool:
        return shape.equations is not None and table.ndim == 4  # of a gain, by renewals

    tokens = [plain(part).unbind(0) for part in inputs.tokens]
    queries = None if inputs.queries is None else plain(inputs.queries)
    mixes = list(map(each, inputs.mixes))
    shares = [each(share) for share in inputs.shares if share is not None]
    for n in range(num):
        keys, offset, step = (part[n] for part in tokens)
        of_mixes, of_shares = ([table[n] for table in tables] for tables in (mixes, shares))
        asked = None if queries is None else queries[n]
        yield Given(keys, offset, step, inputs.gain, of_mixes, of_shares, inputs.limit, asked)


def weights_of(shape: Shape, slots: list[Slots], between: list[list[Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Every parameter where each block of a renewal begins."""
    for block in range(shape.per_renewal):
        at = [each[0] for each in slots] if block == 0 else [each[block - 1] for each in between]
        yield {name: shape.packing.turned(name, weight) for name, weight in zip(names_of(shape), at, strict=True)}


def results_of(shape: Shape, first: list[Slots], steps: list[Stepped]) -> Results:
    """What all steps gave, renewals first."""
    names, each, reads = names_of(shape), None, None
    if shape.equations is not None:
        begun = [first, *(step.slots for step in steps[:-1])]
        each = [w for slots, step in zip(begun, steps, strict=True) for w in weights_of(shape, slots, step.between)]
        reads = None if steps[0].reads is None else torch.stack([step.reads for step in steps])  # type: ignore[misc]

    ends = {name: torch.stack(slots, dim=1) for name, slots in zip(names, steps[-1].slots, strict=True)}  # (r a p q)

    def starts(number: int) -> list[Tensor]:
        slots = zip(*(step.starts[number] for step in steps), strict=True)
        return [torch.stack(slot).movedim(2, 1) for slot in slots]

    inputs, errors = {}, {}
    if shape.equations is None:
        for number, name in enumerate(names):
            errors[name] = torch.stack([step.surprise.errors[number] for step in steps])
        for number, name in enumerate(shape.matrices[1:], 1):
            inputs[name] = torch.stack([step.surprise.inputs[number] for step in steps])
    return Results(
        [torch.stack([ends[name] for name in pack]) for pack in shape.packing.packs],
        {name: starts(number) for number, name in enumerate(names) if each is None},
        inputs,
        errors,
        torch.stack([step.surprise.error for step in steps]),
        each,
        reads,
    )
