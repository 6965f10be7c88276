"""Every public module runs on the meta device, where nothing has a value and nothing may be on another device.

So no forward or backward pass looks at a number on the host, which would hold up an accelerator, and none makes a
tensor where its input is not.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.support.sequence_modules import NUM_TOKENS, READERS, Reader, public_modules
from titans_pytorch import NeuralMemory, TitansConfig, TitansLMM, TitansMAG
from titans_pytorch.attention_transformer import AttentionTransformer
from titans_pytorch.titans.mixers import MIXERS

META = torch.device("meta")
PIECES = (7, 1, 5)

NO_AUTOCAST = pytest.mark.xfail(
    raises=RuntimeError,
    strict=True,
    reason="memory/recompute.py asks torch.get_autocast_dtype about a device that has no autocast",
)


def on_meta(reader: Reader) -> nn.Module:
    with META:
        return reader.made()


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


@pytest.mark.parametrize("name", READERS)
def test_forward_and_backward(name: str) -> None:
    reader = READERS[name]
    module, given = on_meta(reader), reader.given(2, 13).to(META)
    given = given.requires_grad_(given.is_floating_point())
    outputs = reader.outputs(module, given)
    assert outputs.device.type == "meta"
    assert outputs.shape[:2] == (2, 13)
    backward(outputs, module, given)


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.stream is not None])
def test_pieces(name: str) -> None:
    reader = READERS[name]
    module, state = on_meta(reader), None
    for seed, count in enumerate(PIECES):
        with torch.no_grad():
            outputs, state = reader.stream(module, reader.given(2, count, seed).to(META), state)  # type: ignore[misc]
        assert outputs.device.type == "meta"


@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.reads == "ids"])
def test_loss_and_sampling(name: str) -> None:
    reader = READERS[name]
    model, ids = on_meta(reader), reader.given(2, 9).to(META)
    model.loss(ids).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    if not isinstance(model, AttentionTransformer):  # which is only trained and read
        assert model.sample(ids, 12, use_cache=True, show_progress=False).shape == (2, 3)


def test_a_mask_and_surprises() -> None:
    with META:
        memory = NeuralMemory(8, 4, batch_size=8)
    seq = torch.randn(2, 13, 8, device=META)
    mask = torch.ones(2, 13, dtype=torch.bool, device=META)
    outputs, state, (loss, rates) = memory(seq, store_mask=mask, return_surprises=True)
    assert {each.device.type for each in (outputs, loss, rates, *state.updates.values())} == {"meta"}
    backward(outputs, memory, seq)
    fresh = memory.reset(state, mask[:, 0]).select([1, 0])
    assert fresh.waiting.device.type == "meta"


@NO_AUTOCAST
def test_a_call_that_is_computed_again_in_the_backward_pass() -> None:
    """Nothing is computed on the meta device, so that a long call costs no more than a short one."""
    with META:
        memory = NeuralMemory(384, 64)
    assert memory.plan(8, 2048).recomputes
    seq = torch.randn(8, 2048, 384, device=META, requires_grad=True)
    backward(memory(seq)[0], memory, seq)


@NO_AUTOCAST
@pytest.mark.slow
@pytest.mark.parametrize("kind", [TitansLMM, TitansMAG])
def test_blocks_of_the_papers_size(kind: type[nn.Module]) -> None:
    with META:
        model = kind(NUM_TOKENS, replace(TitansConfig.preset("170M", kind.variant), depth=2, memory_refresh=None))
    ids = torch.randint(0, NUM_TOKENS, (4, 4097), device=META)
    model.loss(ids).backward()
    assert all(p.grad is not None for p in model.parameters())
