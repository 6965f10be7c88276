"""The transformer: what each option does, what leaks, what trains, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from benchmarks.operations import held_bytes
from tests.support.mac_configurations import NUM_TOKENS, SEGMENT, build
from titans_pytorch import MemoryMLP, audit
from titans_pytorch.mac.axial import AxialPositions
from titans_pytorch.mac.lengthened import Lengthened
from titans_pytorch.mac_transformer import MemoryAsContextTransformer


def random_ids(batch: int, count: int) -> Tensor:
    return torch.randint(0, NUM_TOKENS, (batch, count), generator=torch.Generator().manual_seed(0))


def stream(model: nn.Module, piece: Tensor, cache: Any) -> tuple[Tensor, Any]:
    return model(piece, cache=cache, return_cache=True)


@pytest.mark.parametrize(
    "options, most, before",
    [
        ({}, 23.1e6, "24.4e6 at bed63c2"),
        (dict(neural_memory_layers=(2,), neural_memory_qkv_receives_diff_views=True), 19.8e6, "24.7e6 at bed63c2"),
    ],
    ids=["a memory in every layer", "one memory with views"],
)
@torch.no_grad()
def test_what_layers_hand_on_does_not_keep_what_it_was_a_part_of(
    options: dict[str, Any], most: float, before: str
) -> None:
    torch.manual_seed(0)
    model = MemoryAsContextTransformer(num_tokens=32, dim=64, depth=4, segment_len=32, **options)
    ids = torch.randint(0, 32, (2, 256))
    assert held_bytes(lambda: model(ids)) <= most, before


@pytest.mark.parametrize("mixes, expected", [(True, [True, False, False]), (False, [False, False, False])])
@torch.no_grad()
def test_a_memory_is_handed_on_as_long_as_a_later_one_mixes_in_its_weights(mixes: bool, expected: list[bool]) -> None:
    model = MemoryAsContextTransformer(
        num_tokens=32, dim=16, depth=3, segment_len=8, neural_memory_layers=(1, 2), neural_mem_weight_residual=mixes
    )
    handed_on = []

    def call(layer: nn.Module, *arguments: Any) -> Any:
        result = layer(*arguments)
        handed_on.append(result[1].memory is not None)
        return result

    model.hidden_of(torch.randn(2, 16, 16), call=call)
    assert handed_on == expected


@pytest.mark.parametrize(
    "chosen",
    [
        dict(neural_memory_segment_len=2),
        dict(neural_memory_segment_len=2, neural_mem_gate_attn_output=True, num_longterm_mem_tokens=1),
        dict(neural_memory_segment_len=2, neural_memory_qkv_receives_diff_views=True, neural_memory_layers=(1, 3)),
        dict(neural_memory_segment_len=2, neural_mem_weight_residual=True, batches=2, num_persist_mem_tokens=1),
    ],
    ids=str,
)
def test_audit(chosen: dict[str, Any]) -> None:
    ids = random_ids(2, 20)
    audit(build(**chosen), ids, num_tokens=NUM_TOKENS, stream=stream, window=SEGMENT + 1).check()


def test_without_memory_nothing_is_seen_beyond_the_window() -> None:
    model, ids = build(neural_memory_layers=()), random_ids(1, 4 * SEGMENT)
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % NUM_TOKENS
    before, after = model(ids), model(changed)
    assert not torch.allclose(before[:, :SEGMENT], after[:, :SEGMENT])
    assert torch.equal(before[:, SEGMENT:], after[:, SEGMENT:])


# ---- inserted tokens and positions


@pytest.mark.parametrize("segment, longterm", [(3, 2), (1, 1), (4, 0), (2, 5)])
def test_longterm_tokens_follow_complete_segments_with_tokens_behind(segment: int, longterm: int) -> None:
    place, mems = Lengthened(segment, longterm), -torch.arange(1.0, longterm + 1)[:, None]
    for count in range(1, 12):
        tokens = torch.arange(float(count))[None, :, None]
        expected: list[float] = []
        for i in range(count):
            expected += mems.flatten().tolist() if i and i % segment == 0 else []
            expected.append(float(i))
        got = place.insert(tokens, mems, 0)
        assert got.flatten().tolist() == expected
        assert place.length(count) == len(expected) == count + (count - 1) // segment * longterm
        assert torch.equal(place.drop(got, 0, count), tokens)
        for cut in range(1, count):
            pieces = [place.insert(tokens[:, :cut], mems, 0), place.insert(tokens[:, cut:], mems, cut)]
            assert torch.equal(torch.cat(pieces, dim=1), got)
            assert torch.equal(place.drop(pieces[1], cut, count - cut), tokens[:, cut:])


def test_positions_are_embedded_by_row_and_column() -> None:
    embed = AxialPositions(6, width=4)
    rows, columns = embed.factors(11)
    whole = embed(0, 11)
    assert_close(whole, torch.stack([rows[p // 4] + columns[p % 4] for p in range(11)]))
    for first, count in ((0, 1), (3, 2), (5, 6), (10, 1)):
        assert_close(embed(first, count), whole[first : first + count])
        assert_close(embed(first, count, (rows, columns)), whole[first : first + count])


def test_positions_can_be_computed_before() -> None:
    model, ids = build(num_longterm_mem_tokens=1), random_ids(2, 10)
    factors = model.axial_pos_emb.factors(model.lengthened.length(10))
    assert_close(model(ids, factorized_pos_emb=factors), model(ids))


# ---- options


def test_the_loss_is_that_of_the_next_token_and_has_named_parts() -> None:
    model, ids = build(), random_ids(2, 9)
    logits = model(ids)[:, :-1]
    expected = -logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).mean()
    loss, parts = model(ids, return_loss=True, return_loss_breakdown=True)
    assert_close(loss, expected)
    assert parts._asdict() == {"next_token": loss}
    assert_close(model(ids.int(), return_loss=True), expected)


def test_the_width_of_feed_forward_networks_can_be_given() -> None:
    plain, given = build(), build(ff_hidden=10)  # int(8 · 2 · 2/3)
    assert plain.config.ff_width == given.config.ff_width == 10
    assert build(ff_hidden=7).layers[0].ff[1].out_features == 2 * 7
    ids = random_ids(2, 6)
    given.load_state_dict(plain.state_dict())
    assert torch.equal(given(ids), plain(ids))
    with pytest.raises(ValueError, match="ff_hidden must be positive, got 0"):
        build(ff_hidden=0)


def test_parts_of_a_layer_are_named_and_stand_where_published_checkpoints_have_them() -> None:
    model = build(neural_memory_layers=(1,))
    first, second = model.layers[0], model.layers[1]
    assert first.memory is first[4]
    assert first.ff is first[6]
    assert second.memory is None
    assert second.attention is second[5]
    assert first.view_selector is None


def test_an_embedding_of_ones_own_may_take_anything() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_tokens = nn.Linear(2, 8)

        def forward(self, features: Tensor) -> Tensor:
            return self.to_tokens(features)

    model = build(token_emb=Mixed().double(), num_longterm_mem_tokens=1)
    features = torch.randn(2, 7, 2, dtype=torch.float64)
    whole = model(features)
    assert whole.shape == (2, 7, NUM_TOKENS)
    _, cache = model(features[:, :4], return_cache=True)
    assert_close(model(features[:, 4:], cache=cache), whole[:, 4:])


def test_an_embedding_of_another_width_is_refused() -> None:
    model = build(token_emb=nn.Embedding(NUM_TOKENS, 9).double())
    with pytest.raises(ValueError, match=r"what token_emb gives must have the shape \(2, 5, 8\), got \(2, 5, 9\)"):
        model(torch.zeros(2, 5, dtype=torch.long))


def test_memories_have_models_of_their_own() -> None:
    memory_model = MemoryMLP(8, depth=1)
    model = build(neural_memory_model=memory_model)
    weights = [layer.memory.memory_model_parameters[0] for layer in model.layers]
    assert len({weight.data_ptr() for weight in weights}) == 3
    assert all(weight.shape[-2:] == (8, 8) for weight in weights[1:] if weight.ndim > 2)


def test_only_named_layers_have_a_memory() -> None:
    model = build(neural_memory_layers=(1, 3))
    assert [layer.memory is not None for layer in model.layers] == [True, False, True]


def test_training_and_evaluation_mode_survive_sampling() -> None:
    model = build().train()
    model.sample(random_ids(1, 2), 3, show_progress=False)
    assert model.training
    assert not model.eval().sample(random_ids(1, 2), 2, show_progress=False).numel()
    assert not model.training


def test_seeds_fix_all_there_is() -> None:
    left, right = build(seed=1).state_dict(), build(seed=1).state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- training


def test_every_parameter_gets_a_gradient() -> None:
    for chosen in (dict(), dict(neural_mem_gate_attn_output=True), dict(num_residual_streams=1)):
        model = build(**chosen)
        model(random_ids(2, 13), return_loss=True).backward()
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = MemoryAsContextTransformer(num_tokens=NUM_TOKENS, dim=16, depth=2, segment_len=4, dim_head=8, heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, NUM_TOKENS, (2, 17))
    losses = []
    for _ in range(20):
        loss = model(ids, return_loss=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_bfloat16_autocast_trains() -> None:
    model = build(neural_memory_segment_len=2, neural_mem_weight_residual=True).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(random_ids(2, 13), return_loss=True)
        loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert_close(loss.float(), model(random_ids(2, 13), return_loss=True), rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [dict(), dict(num_longterm_mem_tokens=1, sliding_window_attn=True)], ids=str)
def test_training_and_decoding_compile_without_graph_breaks(chosen: dict[str, Any]) -> None:
    torch._dynamo.reset()
    model, ids = build(neural_memory_layers=(2,), **chosen), random_ids(2, 12)
    train = torch.compile(lambda ids: model(ids, return_loss=True), backend="eager", fullgraph=True)
    assert_close(train(ids), model(ids, return_loss=True))
    step = torch.compile(lambda ids, cache: stream(model, ids, cache), backend="eager", fullgraph=True)
    with torch.no_grad():
        whole, cache = model(ids), None
        _, cache = stream(model, ids[:, :6], None)
        for i in range(6, 12):
            logits, cache = step(ids[:, i : i + 1], cache)
            assert_close(logits, whole[:, i : i + 1])


# ---- errors

SIZES = dict(num_tokens=NUM_TOKENS, dim=8, depth=2, segment_len=4, dim_head=4, heads=2)


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        (dict(num_tokens=0), ValueError, "num_tokens must be positive, got 0"),
        (dict(dim=-8), ValueError, "dim must be positive"),
        (dict(depth=0), ValueError, "depth must be positive"),
        (dict(depth=1.5), TypeError, "depth must be a whole number"),
        (dict(segment_len=0), ValueError, "segment_len must be positive"),
        (dict(neural_memory_segment_len=0), ValueError, "neural_memory_segment_len must be positive"),
        (dict(num_longterm_mem_tokens=-1), ValueError, "num_longterm_mem_tokens must be at least 0"),
        (dict(num_persist_mem_tokens=-1), ValueError, "num_persist_mem_tokens must be at least 0"),
        (dict(num_residual_streams=0), ValueError, "num_residual_streams must be positive"),
        (dict(ff_mult=0), ValueError, "ff_mult must be positive"),
        (dict(heads=0), ValueError, "heads must be positive"),
        (dict(neural_memory_layers=(3,)), ValueError, "neural_memory_layers must hold numbers from 1 to the depth 2"),
        (dict(neural_memory_layers=(0,)), ValueError, "neural_memory_layers must hold numbers from 1"),
        (dict(neural_memory_layers=1), TypeError, "neural_memory_layers must be a sequence"),
        (dict(neural_memory_batch_size=6), ValueError, "batch_size must be a multiple of the store chunk size 4"),
        (dict(neural_memory_add_value_residual=True), ValueError, "neural_memory_add_value_residual is not supported"),
        (dict(neural_memory_kwargs=dict(chunk_size=2)), ValueError, "neural_memory_kwargs must leave"),
        (dict(neural_memory_kwargs=3), TypeError, "neural_memory_kwargs must be a mapping"),
        (dict(neural_memory_kwargs=dict(dim_head=4)), ValueError, "dim_head must equal dim"),
        (dict(neural_memory_model=3), TypeError, "model must be an nn.Module"),
        (dict(neural_memory_model="rnn"), ValueError, "model must be an nn.Module or one of"),
        (dict(token_emb=3), TypeError, "token_emb must be an nn.Module"),
    ],
    ids=str,
)
def test_refuses_wrong_arguments(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MemoryAsContextTransformer(**SIZES | wrong)


IDS = torch.zeros(2, 5, dtype=torch.long)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda model: model(IDS[0]), ValueError, r"ids must have the shape \(batch, tokens\), got \(5,\)"),
        (lambda model: model(IDS[:, :0]), ValueError, "ids must have at least 1 token"),
        (lambda model: model(IDS[:0]), ValueError, "ids must have at least 1 token"),
        (lambda model: model(IDS[:, :1], return_loss=True), ValueError, "ids must have at least 2 token"),
        (lambda model: model(IDS.float()), TypeError, "ids must be of dtype int64"),
        (lambda model: model([[1, 2]]), TypeError, "ids must be a tensor"),
        (lambda model: model(IDS + NUM_TOKENS), ValueError, "ids must be from 0 to 10, got ids from 11 to 11"),
        (lambda model: model(IDS - 1), ValueError, "ids must be from 0 to 10"),
        (lambda model: model(IDS, return_loss_breakdown=True), ValueError, "return_loss_breakdown needs return_loss"),
        (lambda model: model(IDS, cache=3), TypeError, "cache must be a MACCache"),
        (lambda model: model(IDS[:1], cache=model(IDS, return_cache=True)[1]), ValueError, "cache must be of the in"),
        (lambda model: model(IDS, cache=build()(IDS, return_cache=True)[1]), ValueError, "this model's 2 layers"),
        (
            lambda model: model(
                IDS, cache=MemoryAsContextTransformer(**SIZES, neural_memory_layers=(1,))(IDS, return_cache=True)[1]
            ),
            ValueError,
            "2 of them with a memory, got one of 2 layers, 1 with a memory",
        ),
        (lambda model: model.sample(IDS[0], 9), ValueError, "prompt must have the shape"),
        (lambda model: model.sample(IDS[:, :0], 9), ValueError, "prompt must have at least 1 token"),
        (lambda model: model.sample(IDS, 4), ValueError, "seq_len must be at least the length of the prompt"),
        (lambda model: model.sample(IDS, 6, filter_fn=None), TypeError, "filter_fn must be callable, got None"),
        (lambda model: model(IDS, factorized_pos_emb=(torch.zeros(1, 8),)), ValueError, "factorized_pos_emb must be"),
        (
            lambda model: model(IDS, factorized_pos_emb=model.axial_pos_emb.factors(2)),
            ValueError,
            r"rows \(2 or more, dim\) and columns \(4, dim\)",
        ),
        (lambda model: model.sample(IDS, 6.5), TypeError, "seq_len must be a whole number"),
        (lambda model: model.sample(IDS, 6, temperature=-1.0, show_progress=False), ValueError, "temperature must be"),
    ],
)
def test_refuses_wrong_inputs(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(MemoryAsContextTransformer(**SIZES))
