"""Every public module runs on the meta device, where nothing has a value, and keeps everything there.

So no forward or backward pass looks at a number on the host, which would hold up an accelerator, and none makes a
tensor where its input is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.one_device import OneDevice
from tests.support.sequence_modules import NUM_TOKENS, READERS, Reader, public_modules
from titans_pytorch import NeuralMemory, TitansConfig, TitansLMM, TitansMAG
from titans_pytorch.titans.mixers import MIXERS

META = torch.device("meta")
PIECES = (6, 1, 2)

RARE = ("never refreshed", "memory in one block", "TitansBackbone", "chunks of reading")
"""Of names that are tried in the long run only; what they do, others do as well"""


def cases(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] if any(map(name.count, RARE)) else []) for name in names]


def on_meta(build: Callable[[], Any]) -> Any:
    """What is made there; a memory model is tried on the CPU meanwhile, which is no part of what runs later."""
    with META:
        return build()


def given_on_meta(reader: Reader, batch: int, count: int) -> Tensor:
    return on_meta(lambda: reader.drawn(batch, count, None))


def backward(outputs: Tensor, module: nn.Module, given: Tensor) -> None:
    """A backward pass reaches every parameter that trains, and the input, on their device."""
    outputs.square().sum().backward()
    reached = [p for p in module.parameters() if p.requires_grad]
    reached += [given] if given.requires_grad else []
    assert reached
    for each in reached:
        assert each.grad is not None
        assert each.grad.device.type == "meta"


def test_every_public_module_is_among_them() -> None:
    assert public_modules() - {reader.kind for reader in READERS.values()} == set()
    assert {f"TitansBackbone, {variant}" for variant in MIXERS} <= set(READERS)


@pytest.mark.parametrize("name", cases(READERS))
def test_forward_and_backward(name: str) -> None:
    reader = READERS[name]
    module, given = on_meta(reader.made), given_on_meta(reader, 2, 9)
    given = given.requires_grad_(given.is_floating_point())
    with OneDevice(META):
        outputs = module.loss(given) if reader.reads == "ids" else reader.outputs(module, given)
        assert outputs.shape[:2] == (() if reader.reads == "ids" else (2, 9))
        backward(outputs, module, given)


@pytest.mark.parametrize("name", cases(name for name, reader in READERS.items() if reader.stream is not None))
@torch.no_grad()
def test_pieces(name: str) -> None:
    reader = READERS[name]
    module, state = on_meta(reader.made), None
    for count in PIECES:
        piece = given_on_meta(reader, 2, count)
        with OneDevice(META):
            outputs, state = reader.stream(module, piece, state)  # type: ignore[misc]
        assert outputs.shape[:2] == (2, count)


@pytest.mark.parametrize("name", cases(name for name, reader in READERS.items() if hasattr(reader.kind, "sample")))
def test_sampling(name: str) -> None:
    reader = READERS[name]
    model, ids = on_meta(reader.made), given_on_meta(reader, 2, 4)
    with OneDevice(META):
        assert model.sample(ids, 6, use_cache=True, show_progress=False).shape == (2, 2)


def test_a_mask_and_surprises() -> None:
    memory = on_meta(lambda: NeuralMemory(8, 4, batch_size=8))
    seq, mask = on_meta(lambda: (torch.randn(2, 13, 8), torch.ones(2, 13, dtype=torch.bool)))
    with OneDevice(META):
        outputs, state, _ = memory(seq, store_mask=mask, return_surprises=True)
        assert len(dict(state.updates)) > 0
        backward(outputs, memory, seq)
        memory.reset(state, mask[:, 0]).repeat(2)


def test_a_call_that_is_computed_again_in_the_backward_pass() -> None:
    """Nothing is computed on the meta device, so that a long call costs no more than a short one."""
    memory, seq = on_meta(lambda: (NeuralMemory(384, 64), torch.randn(8, 2048, 384, requires_grad=True)))
    assert memory.plan(8, 2048).recomputes
    with OneDevice(META):
        backward(memory(seq)[0], memory, seq)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [TitansLMM, TitansMAG])
def test_blocks_of_the_papers_size(kind: type[nn.Module]) -> None:
    config = replace(TitansConfig.preset("170M", kind.variant), depth=2, memory_refresh=None)
    model, ids = on_meta(lambda: (kind(NUM_TOKENS, config), torch.randint(0, NUM_TOKENS, (4, 4097))))
    with OneDevice(META):
        model.loss(ids).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x @ torch.ones(8, 8),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x * torch.tensor(2.0),
        lambda x: x * x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x + torch.ones(8),
    ],
)
def test_what_would_hold_up_or_fail_elsewhere_is_noticed(forward: Callable[[Tensor], Tensor]) -> None:
    with OneDevice(META), pytest.raises(RuntimeError):
        forward(torch.ones(8, 8, device=META))


def test_what_was_loaded_by_assignment_can_be_moved() -> None:
    """A model that was made here takes tensors that lie elsewhere as they are; its memory's form follows."""
    memory = NeuralMemory(8, 4)
    made = on_meta(lambda: NeuralMemory(8, 4))
    made.load_state_dict(memory.state_dict(), assign=True)
    seq = torch.randn(2, 9, 8)
    expected = memory(seq)[0]
    torch.testing.assert_close(made.to("cpu")(seq)[0], expected)
    torch.testing.assert_close(made.double()(seq.double())[0], memory.double()(seq.double())[0])
    assert all(p.is_meta for p in made.to("meta").memory_model.parameters())
