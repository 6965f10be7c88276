"""A global memory with long chunks beside local ones that restart: equations, pieces, states, models, mistakes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support.oracle import oracle
from tests.support.shards_by_the_book import ShardsUnderTest
from tests.support.streams import disturbed, in_pieces, randn
from tests.support.titans_configurations import DIM, MODELS, NUM_TOKENS, random_ids
from tests.test_exactness import GRADIENTS, VALUES
from titans_pytorch import (
    TitansBackbone,
    TitansConfig,
    TitansMAC,
    TNTMemory,
    TNTState,
    audit,
    load_state,
    save_state,
)
from titans_pytorch.auditing.audit import stream_with_state

SMALL: dict[str, Any] = dict(global_chunk=6, local_chunks=(2, 4), shard=8)
CONFIG = TitansConfig.tnt(DIM, 2, global_chunk=4, local_chunks=(2,), shard=8, heads=2, window=4, ff_hidden=6)
VARIANTS = ("mag", "mal", "lmm")


def tnt(**options: Any) -> TNTMemory:
    torch.manual_seed(0)
    return disturbed(TNTMemory(6, heads=2, **SMALL | options).double())


def by_equations(memory: TNTMemory, x: Tensor, **cut: Any) -> Tensor:
    """Eq. 15: the sum of what every memory says, each token by token."""
    given, total = SMALL | {"qk_projection": "shard"} | cut, torch.zeros_like(x)
    chunks = (given["global_chunk"], *given["local_chunks"])
    for number, (chunk, each) in enumerate(zip(chunks, memory.memories, strict=True)):
        shards = ShardsUnderTest(given["shard"], given["qk_projection"]) if number else ShardsUnderTest(None)
        options = dict(dim=6, heads=2, dim_head=3, chunk_size=chunk, batch_size=chunk, activation=torch.nn.SiLU())
        options |= dict(qk_l2norm=True, conv_size=4, learned_norm_gain=True, gated_output=True, max_weight_growth=10.0)
        options |= dict(default_step_transform_max_lr=0.3)
        parameters = dict(each.named_parameters())
        answers = oracle(parameters, each.memory_model, x, layer_kind=shards.layer, **options)
        total = total + answers.retrieved
    return total


@pytest.mark.parametrize(
    "cut",
    [{}, dict(qk_projection="chunk"), dict(qk_projection=None, local_chunks=(4,))],
    ids=["shard", "chunk", "bare"],
)
def test_it_is_the_sum_of_what_its_memories_say(cut: dict[str, Any]) -> None:
    memory, x = tnt(**cut), randn(2, 21, 6).requires_grad_()
    got, expected = memory(x)[0], by_equations(memory, x, **cut)
    assert_close(got, expected, **VALUES)
    assert_close(in_pieces(memory, x, (3, 5, 9, 1, 3))[0], expected, **VALUES)
    wanted, weight = [x, *memory.parameters()], randn(2, 21, 6, seed=1)
    left, right = (torch.autograd.grad((y * weight).sum(), wanted, allow_unused=True) for y in (got, expected))
    for g, other in zip(left, right, strict=True):
        assert_close(g, other, **GRADIENTS)


def test_a_state_is_saved_selected_repeated_joined_and_reset(tmp_path: Any) -> None:
    memory, x, after = tnt(), randn(3, 13, 6), randn(3, 9, 6, seed=1)
    state = memory(x)[1]
    assert (state.batch, state.num_seen) == (3, 13)
    expected = memory(after, state)[0]
    save_state(state, tmp_path / "state", memory)
    loaded: Any = load_state(tmp_path / "state", model=memory)
    assert_close(memory(after, loaded)[0], expected, **VALUES)
    assert_close(memory(after, state.detach().to(torch.float64).at_rest())[0], expected, **VALUES)
    joined = TNTState.join([state.select([2]), state.select([0])])
    assert_close(memory(after[[2, 0]], joined)[0], expected[[2, 0]], **VALUES)
    twice = state.select([1]).repeat(2)
    assert_close(memory(after[[1, 1]], twice)[0], expected[[1, 1]], **VALUES)
    forgotten = memory.reset(state, torch.tensor([True, False, True]))
    assert_close(memory(after, forgotten)[0][1], expected[1], **VALUES)
    assert (memory(after, forgotten)[0][0] - expected[0]).abs().max() > 1e-3


def test_it_is_saved_and_loaded(tmp_path: Any) -> None:
    memory = TNTMemory(6, heads=2, **SMALL, options=dict(momentum_order=2))
    memory.save_pretrained(tmp_path)
    x = torch.randn(1, 19, 6)
    assert_close(TNTMemory.from_pretrained(tmp_path)(x)[0], memory(x)[0])


def test_padding_documents_and_masks() -> None:
    memory, x = tnt(), randn(2, 14, 6)
    mask = torch.tensor([[1] * 14, [0] * 5 + [1] * 9], dtype=torch.bool)
    found, state = memory(x, attention_mask=mask)
    assert_close(found[1, 5:], memory(x[1:, 5:])[0][0], **VALUES)
    assert_close(memory(x, state)[0][:1], memory(x[:1], memory(x[:1])[1])[0], **VALUES)
    assert_close(memory(x, store_mask=mask)[0][:1], memory(x[:1])[0], **VALUES)
    assert (memory(x, store_mask=mask)[0][1] - memory(x)[0][1]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="store_mask is of rows at one position, got it with padding"):
        memory(x, store_mask=mask, attention_mask=mask)


def test_gates_of_every_token_read_what_was_stored_up_to_them() -> None:
    memory = tnt(token_gates=True)
    assert [each.layout for each in memory.memories] == [(1, 1, 6, 1), (1, 1, 2, 1), (1, 1, 4, 1)]
    x = randn(1, 21, 6)
    assert_close(in_pieces(memory, x, (4, 13, 4))[0], memory(x)[0], **VALUES)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(local_chunks=()), ValueError, "local_chunks must have at least one number"),
        (dict(local_chunks=2), TypeError, "local_chunks must be a sequence of whole numbers, got 2"),
        (dict(local_chunks=(3,)), ValueError, r"shard must be a multiple of the chunk size to read \(3\), got 8"),
        (dict(options=dict(shard=4)), ValueError, r"options must leave \['shard'\] to the arguments of the TNTMemory"),
        (dict(qk_projection="batch"), ValueError, "qk_projection must be one of None, 'chunk', 'shard', got 'batch'"),
    ],
)
def test_wrong_arguments_end_in_a_sentence(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TNTMemory(6, heads=2, **SMALL | options)


def test_wrong_states_end_in_a_sentence() -> None:
    memory, x = tnt(), randn(1, 3, 6)
    state: Any = memory(x)[1]
    with pytest.raises(TypeError, match="state must be a TNTState, got NeuralMemState"):
        memory(x, state.memories[0])
    with pytest.raises(ValueError, match="state must be of 3 memories, got one of 1"):
        memory(x, TNTState(state.memories[:1]))


# models


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_stream_and_are_causal(variant: Any) -> None:
    torch.manual_seed(0)
    backbone = disturbed(TitansBackbone(variant, CONFIG).double())
    audit(backbone, randn(2, 19, DIM), stream=stream_with_state, splits=[(1,) * 19, (5, 2, 12)]).check()


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_that_models_learn_gets_a_gradient(variant: str) -> None:
    model = MODELS[variant](NUM_TOKENS, CONFIG)
    model.loss(random_ids(2, 25)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_second_stage_goes_on_with_smaller_chunks() -> None:
    torch.manual_seed(0)
    first = MODELS["mag"](NUM_TOKENS, replace(CONFIG, memory_local_chunks=(4,)))
    second = MODELS["mag"](NUM_TOKENS, replace(CONFIG, memory_local_chunks=(1,)))
    second.load_state_dict(first.state_dict())
    ids = random_ids(1, 21)
    assert (first(ids)[0] - second(ids)[0]).abs().max() > 1e-5
    second.loss(ids).backward()


def test_a_model_is_saved_decodes_and_forgets_nothing_without_decay(tmp_path: Any) -> None:
    config = replace(CONFIG, decay=False, memory_qk_projection="chunk")
    torch.manual_seed(0)
    model = MODELS["lmm"](NUM_TOKENS, config)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    ids = random_ids(2, 9)
    assert again.config == config
    assert_close(again(ids)[0], model(ids)[0])
    prompt = dict(temperature=0.0, generator=None)
    assert torch.equal(model.sample(ids, 20, **prompt), model.sample(ids, 20, use_cache=False, **prompt))
    keeps = [each.to_decay_factor[0] for each in model.backbone.blocks[0].mixer.memory.memories]
    assert not any(layer.weight.requires_grad for layer in keeps)
    assert all((layer.bias == -80).all() for layer in keeps)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(memory_local_chunks=(3,)), r"memory_local_chunks must divide the shard \(8\), got 3"),
        (dict(memory_refresh=8), r"memory_refresh must be memory_chunk \(4\) with memory_local_chunks, got 8"),
        (dict(memory_shard=0), "memory_shard must be positive, got 0"),
        (dict(memory_qk_projection="batch"), "memory_qk_projection must be one of None, 'chunk', 'shard'"),
        (dict(memory_options=dict(shard=8)), r"memory_options must leave \['shard'\] to the arguments of the config"),
    ],
)
def test_wrong_configs_end_in_a_sentence(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **changes)


def test_mac_asks_its_memory_alone() -> None:
    with pytest.raises(ValueError, match="variant must be mag, mal or lmm with memory_local_chunks"):
        TitansMAC(NUM_TOKENS, CONFIG)
