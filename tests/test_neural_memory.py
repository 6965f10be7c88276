"""NeuralMemory as users of the published package know it: what is called how, and what comes back."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.support.configurations import MODELS
from tests.support.streams import in_pieces, randn
from titans_pytorch import (
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    NeuralMemory,
    NeuralMemState,
    losses,
    mem_state_detach,
)
from titans_pytorch.neural_memory import AssocScan

EXACT = dict(rtol=1e-9, atol=1e-10)

DEFAULTS: dict[str, Any] = dict(
    chunk_size=1,
    batch_size=None,
    dim_head=None,
    heads=1,
    model=None,
    adaptive_step_transform=None,
    default_step_transform_max_lr=1.0,
    per_parameter_lr_modulation=False,
    max_mem_layer_modulation=1.0,
    per_head_learned_parameters=True,
    attn_pool_chunks=False,
    momentum=True,
    momentum_order=1,
    learned_momentum_combine=False,
    learned_combine_include_zeroth=False,
    num_kv_per_token=1,
    qkv_receives_diff_views=False,
    pre_rmsnorm=True,
    post_rmsnorm=False,
    qk_rmsnorm=False,
    max_grad_norm=None,
    use_accelerated_scan=False,
    activation=None,
    init_adaptive_step_bias=None,
    init_momentum_bias=None,
    init_decay_bias=None,
    accept_weight_residual=False,
    spectral_norm_surprises=False,
    gated_transition=False,
    mem_model_norm_add_residual=True,
    store_with_lookahead_value=False,
)


def memory64(*args: Any, seed: int = 0, **options: Any) -> NeuralMemory:
    torch.manual_seed(seed)
    return NeuralMemory(*args, **options).double()


# construction


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_published_package(name: str) -> None:
    assert inspect.signature(NeuralMemory).parameters[name].default == DEFAULTS[name]


def test_the_default_memory_is_an_mlp_of_two_layers_four_times_as_wide_with_residual_and_norm() -> None:
    memory = NeuralMemory(dim=6)
    names = [name for name, _ in memory.memory_model.named_parameters()]
    shapes = [tuple(p.shape) for p in memory.memory_model_parameters]
    assert names == ["norm.gamma", "model.weights.0", "model.weights.1"]
    assert shapes == [(1, 6), (1, 6, 24), (1, 24, 6)]


def test_the_arguments_of_the_call_come_in_the_published_order() -> None:
    forward = inspect.signature(NeuralMemory.forward).parameters
    ours = [name for name, each in forward.items() if each.kind is inspect.Parameter.KEYWORD_ONLY]
    assert list(forward)[1:] == [
        *("seq", "store_seq", "state", "detach_mem_state", "prev_weights"),
        *("store_mask", "return_surprises", "ttt_batch_size"),
        *ours,
    ]
    assert ours == ["attention_mask", "document_ids", "cu_seqlens"], "ours are given by name"
    store = inspect.signature(NeuralMemory.store_memories)
    assert list(store.parameters)[1:] == [
        *("seq", "weights", "past_state", "seq_index", "prev_weights", "mask", "return_surprises")
    ]


def test_parameters_have_the_published_names_and_shapes() -> None:
    memory = NeuralMemory(
        dim=6,
        dim_head=4,
        heads=2,
        chunk_size=2,
        batch_size=4,
        num_kv_per_token=3,
        momentum_order=2,
        learned_momentum_combine=True,
        learned_combine_include_zeroth=True,
        per_parameter_lr_modulation=True,
        attn_pool_chunks=True,
        post_rmsnorm=True,
        qk_rmsnorm=True,
        accept_weight_residual=True,
        gated_transition=True,
        activation=nn.SiLU(),
    )
    gates = {
        "to_adaptive_step.0": 6,
        "to_momentum.0": 4,
        "to_learned_momentum_combine.0": 6,
        "to_layer_modulation.0": 6,
        "to_learned_weight_residual_mix.0": 2,
        "to_decay_factor.0": 2,
        "reduce_to_chunk_rep.to_attn_logits": 6,
    }
    expected = {f"{name}.weight": (out, 6) for name, out in gates.items()}
    expected |= {f"{name}.bias": (out,) for name, out in gates.items()}
    expected |= {"retrieve_norm.weight": (6,), "store_norm.weight": (6,), "transition_gate": ()}
    expected |= dict.fromkeys(("q_norm.gamma", "k_norm.gamma", "multihead_rmsnorm.gamma"), (2, 1, 4))
    expected |= {"to_queries.0.weight": (8, 6), "to_keys.0.weight": (24, 6), "to_values.0.weight": (24, 6)}
    expected |= {"combine_heads.weight": (6, 8), "retrieve_gate.0.weight": (2, 6)}
    expected |= {f"memory_model_parameters.{i}": s for i, s in enumerate([(2, 4), (2, 4, 16), (2, 16, 4)])}
    assert {name: tuple(p.shape) for name, p in memory.state_dict().items()} == expected
    assert memory.transition_gate.item() == -5
    assert not memory.reduce_to_chunk_rep.to_attn_logits.weight.any()


def test_initial_biases_make_their_gates_constant() -> None:
    memory = NeuralMemory(6, init_adaptive_step_bias=-3.0, init_momentum_bias=2.0, init_decay_bias=-4.0)
    for name, value in (("to_adaptive_step", -3.0), ("to_momentum", 2.0), ("to_decay_factor", -4.0)):
        linear = getattr(memory, name)[0]
        assert not linear.weight.any()
        assert (linear.bias == value).all()


# shapes

GRID: list[tuple[int, bool, dict[str, Any]]] = [  # tokens, whether some are masked, options
    (77, False, dict(chunk_size=64)),
    (32, True, dict(chunk_size=64, activation=nn.SiLU(), per_parameter_lr_modulation=True, max_grad_norm=2.0)),
    (77, True, dict(chunk_size=64, attn_pool_chunks=True, heads=4, max_grad_norm=2.0, num_kv_per_token=2)),
    (512, False, dict(chunk_size=64, attn_pool_chunks=True, activation=nn.SiLU(), momentum=False, qk_rmsnorm=True)),
    (32, True, dict(chunk_size=1, heads=4, momentum=False, qk_rmsnorm=True, per_parameter_lr_modulation=True)),
    (512, False, dict(chunk_size=1, activation=nn.SiLU(), heads=4, num_kv_per_token=2)),
]
"""A tenth of what could be combined: whether the numbers are right is the oracle's to say."""


@pytest.mark.parametrize("seq_len, has_mask, options", GRID)
def test_the_answer_has_the_shape_of_the_question(seq_len: int, has_mask: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    memory = NeuralMemory(dim=16, default_model_kwargs=dict(depth=2, expansion_factor=2.0), **options)
    seq = torch.randn(2, seq_len, 16)
    mask = torch.randint(0, 2, (2, seq_len)).bool() if has_mask else None
    retrieved, state, (loss, rates) = memory(seq, store_mask=mask, return_surprises=True)
    heads, chunk = options.get("heads", 1), options["chunk_size"]
    num_stored = seq_len // chunk * chunk
    assert retrieved.shape == seq.shape
    assert loss.shape == rates.shape == (2, heads, num_stored * options.get("num_kv_per_token", 1))
    assert retrieved.isfinite().all()
    assert state.seq_index == num_stored
    assert state.cache_store_segment.shape == (2, seq_len - num_stored, 16)
    assert state.updates["model.weights.0"].shape == (2 * heads, num_stored // chunk + 1, 16, 32)


@pytest.mark.parametrize("orders", [2, 3])
@pytest.mark.parametrize("combine, zeroth", [(False, False), (True, False), (True, True)])
def test_momentum_of_higher_order(orders: int, combine: bool, zeroth: bool) -> None:
    options = dict(learned_momentum_combine=combine, learned_combine_include_zeroth=zeroth)
    memory = NeuralMemory(dim=8, dim_head=4, heads=2, chunk_size=4, momentum_order=orders, **options)
    retrieved, state = memory(torch.randn(3, 17, 8))
    assert retrieved.shape == (3, 17, 8)
    assert state.states[1]["model.weights.0"].shape == (orders, 6, 4, 16)


def test_without_momentum_the_state_holds_none() -> None:
    _, state = NeuralMemory(dim=8, chunk_size=4, momentum=False)(torch.randn(1, 8, 8))
    assert state.states[1] == {}


@pytest.mark.parametrize("model", [MemoryAttention(6), MemorySwiGluMLP(6), MemoryMLP(6, depth=1)])
def test_the_memory_may_be_another_network(model: nn.Module) -> None:
    memory = NeuralMemory(dim=10, dim_head=6, heads=2, chunk_size=8, model=model)
    retrieved, state = memory(torch.randn(2, 33, 10))
    assert retrieved.shape == (2, 33, 10)
    assert set(state.weights) == {"norm.gamma", *(f"model.{name}" for name, _ in model.named_parameters())}
    assert all(p.requires_grad for p in model.parameters()), "the given model is left as it was"


def test_the_given_model_is_where_the_memory_starts() -> None:
    model = MemoryMLP(4, depth=2)
    memory = NeuralMemory(4, model=model, mem_model_norm_add_residual=False)
    for initial, given in zip(memory.memory_model_parameters, model.parameters(), strict=True):
        assert torch.equal(initial[0], given)
        assert initial.data_ptr() != given.data_ptr()


def test_heads_may_share_their_initial_memory() -> None:
    memory = NeuralMemory(dim=8, heads=2, dim_head=4, chunk_size=4, per_head_learned_parameters=False)
    assert [tuple(p.shape) for p in memory.memory_model_parameters] == [(4,), (4, 16), (16, 4)]
    assert memory(torch.randn(2, 9, 8))[0].shape == (2, 9, 8)


# chaining


@pytest.mark.parametrize("gated_transition", [False, True])
def test_chunks_one_after_another_equal_all_in_parallel(gated_transition: bool) -> None:
    memory = memory64(dim=8, dim_head=4, heads=2, chunk_size=4, batch_size=8, gated_transition=gated_transition)
    if gated_transition:
        nn.init.constant_(memory.transition_gate, 0.7)
    seq = randn(2, 32, 8)
    whole, last = memory(seq)
    state, parts = None, []
    for piece in seq.split(4, dim=1):
        part, state = memory(piece, state=state)
        parts.append(part)
    assert_close(torch.cat(parts, dim=1), whole, **EXACT)
    assert_close(state.states, last.states, **EXACT)
    assert_close(state.weights, last.weights, **EXACT)


def test_a_second_layer_may_be_fed_in_halves_with_the_weights_of_a_whole_first() -> None:
    first = memory64(dim=8, dim_head=4, heads=2, chunk_size=4)
    second = memory64(dim=8, dim_head=4, heads=2, chunk_size=4, accept_weight_residual=True, seed=1)
    seq = randn(2, 24, 8)
    _, before = first(seq)
    whole, last = second(seq, prev_weights=before.updates)
    start, state = second(seq[:, :12], prev_weights=before.updates)
    end, state = second(seq[:, 12:], state=state, prev_weights=before.updates)
    assert_close(torch.cat((start, end), dim=1), whole, **EXACT)
    assert_close(state.states, last.states, **EXACT)


def test_previous_weights_are_taken_as_state_as_updates_or_as_tensors() -> None:
    first, second = memory64(8, 4), memory64(8, 4, accept_weight_residual=True)
    seq = randn(1, 12, 8)
    _, before = first(seq)
    answers = [second(seq, prev_weights=given)[0] for given in (before, before.updates, dict(before.updates))]
    assert_close(answers[0], answers[1], rtol=0, atol=0)
    assert_close(answers[0], answers[2], **EXACT)


@pytest.mark.parametrize("chunk_size", [1, 3, 4])
@pytest.mark.parametrize("prompt_len", [4, 7])
def test_token_by_token_after_a_prompt(chunk_size: int, prompt_len: int) -> None:
    memory = memory64(dim=8, dim_head=4, heads=2, chunk_size=chunk_size, batch_size=2 * chunk_size)
    seq = randn(2, 16, 8)
    whole, _ = memory(seq)
    retrieved, state = memory(seq[:, :prompt_len])
    parts = [retrieved]
    for token in seq[:, prompt_len:].unbind(dim=1):
        retrieved, state = memory(token, state=state)
        assert retrieved.shape == (2, 1, 8)
        parts.append(retrieved)
    assert_close(torch.cat(parts, dim=1), whole, **EXACT)


def test_a_detached_state_ends_the_graph_between_calls() -> None:
    memory = NeuralMemory(dim=8, chunk_size=4)
    state, first = None, torch.randn(2, 8, 8, requires_grad=True)
    for seq in (first, torch.randn(2, 8, 8)):
        memory.zero_grad()
        retrieved, state = memory(seq, state=state)
        state = mem_state_detach(state)
        retrieved.sum().backward()  # a second time through the first graph would raise
    tensors = [*state.weights.values(), *state.states[0].values(), *state.states[1].values(), *state.updates.values()]
    assert not any(t.requires_grad for t in (*tensors, state.cache_store_segment))
    _, detached = memory(first, detach_mem_state=True)
    assert not any(t.requires_grad for t in detached.states[0].values())
    _, attached = memory(first)
    assert all(t.requires_grad for t in attached.states[0].values())


def test_gradients_flow_through_the_state_to_earlier_calls() -> None:
    memory, first = memory64(8, 4), randn(1, 8, 8).requires_grad_()
    _, state = memory(first)
    memory(randn(1, 4, 8), state=state)[0].sum().backward()
    assert first.grad.abs().sum() > 0


def test_the_associative_scan_can_be_imported_and_chained() -> None:
    scan = AssocScan()
    gates, inputs = torch.rand(2, 32, 3).double(), randn(2, 32, 3)
    whole = scan(gates, inputs)
    start = scan(gates[:, :16], inputs[:, :16])
    end = scan(gates[:, 16:], inputs[:, 16:], prev=start[:, -1])
    assert_close(torch.cat((start, end), dim=1), whole, **EXACT)


# what is stored


def test_store_seq_is_stored_instead_of_seq() -> None:
    memory, seq, other = memory64(8, 4), randn(2, 8, 8), randn(2, 8, 8, seed=1)
    same, _ = memory(seq, store_seq=seq)
    assert torch.equal(same, memory(seq)[0])
    _, state = memory(seq, store_seq=other)
    assert_close(state.states, memory(other)[1].states, **EXACT)


def test_three_views_are_seen_by_queries_keys_and_values() -> None:
    memory = memory64(8, 4, qkv_receives_diff_views=True)
    views = randn(3, 2, 12, 8)
    whole, last = memory(views)
    assert whole.shape == (2, 12, 8)
    for view in range(3):
        changed = views.clone()
        changed[view] += 1.0
        other, state = memory(changed)
        is_stored_alike = torch.equal(state.states[0]["model.weights.0"], last.states[0]["model.weights.0"])
        assert is_stored_alike == (view == 0)
        assert not torch.equal(other, whole)
    stored, _ = memory(torch.zeros_like(views), store_seq=views[1:])[1].states
    assert_close(stored, last.states[0], **EXACT)


def test_equal_views_are_one_sequence() -> None:
    torch.manual_seed(0)
    plain, seq = memory64(8, 4), randn(2, 12, 8)
    viewing = memory64(8, 4, qkv_receives_diff_views=True)
    viewing.load_state_dict(plain.state_dict())
    assert_close(viewing(seq.expand(3, -1, -1, -1))[0], plain(seq)[0], **EXACT)


def test_storing_and_reading_apart_equal_the_call() -> None:
    memory, seq = memory64(dim=8, dim_head=4, heads=2, chunk_size=4), randn(2, 14, 8)
    whole, last, (loss, rates) = memory(seq, return_surprises=True)
    updates, state, (stored_loss, stored_rates) = memory.store_memories(seq)
    assert isinstance(state, NeuralMemState)
    assert_close(memory.retrieve_memories(seq, updates), whole, **EXACT)
    assert_close(state.states, last.states, **EXACT)
    assert_close((stored_loss, stored_rates), (loss, rates), **EXACT)
    assert state.seq_index == 12
    assert len(memory.store_memories(seq, return_surprises=False)) == 2


def test_storing_goes_on_from_weights_and_past_state() -> None:
    memory, seq = memory64(8, 4, batch_size=8), randn(2, 16, 8)
    _, whole, _ = memory.store_memories(seq)
    _, half, _ = memory.store_memories(seq[:, :8])
    _, state, _ = memory.store_memories(seq[:, 8:], half.weights, half.states, half.seq_index)
    assert state.seq_index == 16
    assert_close(state.states, whole.states, **EXACT)
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, 8:] = False
    _, masked, _ = memory.store_memories(seq, mask=mask)
    assert_close(masked.states, half.states, **EXACT)


def test_one_memory_can_be_read_by_all_tokens() -> None:
    memory, seq = memory64(dim=8, dim_head=4, heads=2, chunk_size=4), randn(2, 6, 8)
    fresh = memory.init_weights(2)
    read = memory.retrieve_memories(seq, fresh)
    assert_close(read[:, :3], memory(seq)[0][:, :3], **EXACT)
    assert read.shape == seq.shape


def test_fresh_weights_and_momenta() -> None:
    memory = NeuralMemory(dim=8, dim_head=4, heads=2, momentum_order=2)
    weights, momenta = memory.init_weights(3), memory.init_momentum(3)
    assert {name: tuple(w.shape) for name, w in weights.items()} == {
        "norm.gamma": (6, 4),
        "model.weights.0": (6, 4, 16),
        "model.weights.1": (6, 16, 4),
    }
    assert {name: tuple(m.shape) for name, m in momenta.items()} == {n: (2, *w.shape) for n, w in weights.items()}
    assert not any(m.any() for m in momenta.values())
    heads = memory.memory_model_parameters[1]
    assert torch.equal(weights["model.weights.0"], heads.repeat(3, 1, 1)), "heads are the faster axis"


def test_another_batch_size_for_one_call() -> None:
    one, other = memory64(8, 4), memory64(8, 4, batch_size=8)
    other.load_state_dict(one.state_dict())
    seq = randn(1, 20, 8)
    assert_close(one(seq, ttt_batch_size=8)[0], other(seq)[0], **EXACT)
    assert not torch.allclose(one(seq)[0], other(seq)[0])


def test_reported_surprise_is_the_loss_without_the_rate() -> None:
    memory, seq = memory64(8, 4, pre_rmsnorm=False), randn(1, 8, 8)
    _, _, (loss, rates) = memory(seq, return_surprises=True)
    keys, values = memory.to_keys(seq), memory.to_values(seq)
    prediction = torch.func.functional_call(
        memory.memory_model, {name: w[0] for name, w in memory.init_weights(1).items()}, (keys,)
    )
    assert_close(loss[:, 0], (prediction - values).square().mean(dim=-1), **EXACT)
    assert_close(rates[:, 0], memory.to_adaptive_step[0](seq).squeeze(-1).sigmoid(), **EXACT)


def test_a_loss_and_a_step_of_ones_own() -> None:
    options = dict(
        store_memory_loss_fn=lambda prediction, value: -(prediction * value).sum(dim=-1),
        adaptive_step_transform=lambda raw: raw.exp() * 0.1,
    )
    memory, seq = memory64(8, 4, **options), randn(1, 8, 8)
    _, _, (loss, rates) = memory(seq, return_surprises=True)
    assert (loss < 0).any()
    raw = memory.to_adaptive_step[0](memory.store_norm(seq)).squeeze(-1)
    assert_close(rates[:, 0], raw.exp() * 0.1, **EXACT)


def test_a_sparse_step_is_nothing_where_the_gate_is_low_and_the_token_is_not_stored() -> None:
    memory, seq = memory64(8, 1, adaptive_step_transform="sparse", momentum=False, model="linear"), randn(1, 32, 8)
    with torch.no_grad():
        memory.to_adaptive_step[0].bias.fill_(-2.3)
    _, _, (_, rates) = memory(seq, return_surprises=True)
    gate = memory.to_adaptive_step[0](memory.store_norm(seq)).squeeze(-1).sigmoid()
    assert 4 < (rates == 0).sum() < 28
    assert_close(rates[:, 0], (1.1 * gate - 0.1).clamp(min=0), **EXACT)
    with torch.no_grad():
        memory.to_adaptive_step[0].bias.fill_(-10.0)  # a plain gate would still store a little of every token
        memory.to_decay_factor[0].bias.fill_(-100.0)
    _, state = memory(seq)
    assert_close(dict(state.states[0]), dict(memory.init_weights(1)), atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "default"])
def test_the_given_model_is_never_run_with_its_own_weights(name: str) -> None:
    """Two copies with other weights of their own, but equal learned ones, answer alike."""
    stands_alone = dict(mem_model_norm_add_residual=False) if name == "layerwise" else {}
    one, other = (memory64(4, 2, model=MODELS[name](), seed=seed, **stands_alone) for seed in (0, 1))
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        for p in other.memory_model.parameters():
            p.fill_(torch.nan)
    seq = randn(2, 7, 4)
    assert torch.equal(one(seq)[0], other(seq)[0])


def test_looking_ahead_in_chunks_of_one_token_only_forgets() -> None:
    """No token has a next one in its chunk: w = (1 - alpha) w at every token, and nothing is reported."""
    with pytest.warns(UserWarning, match="only forgets"):
        built = NeuralMemory(6, 1, store_with_lookahead_value=True, init_decay_bias=0.0).double()
    retrieved, state, (loss, rates) = built(randn(2, 5, 6), return_surprises=True)
    for name, initial in built.init_weights(2).items():
        assert_close(state.current[name], initial * 0.5**5)
        assert not state.momenta[name].any()
    assert loss.shape == rates.shape == (2, 1, 0)
    assert_close(in_pieces(built, randn(2, 5, 6), [1, 3, 1])[0], retrieved)


def test_losses_have_names() -> None:
    torch.manual_seed(0)
    summed = NeuralMemory(6, 2, summed_loss=True).double()
    seq = randn(1, 9, 6)
    for options in (dict(loss="sse"), dict(store_memory_loss_fn=losses.summed_squared_error)):
        torch.manual_seed(0)
        assert torch.equal(NeuralMemory(6, 2, **options).double()(seq)[0], summed(seq)[0])
    torch.manual_seed(0)
    assert not torch.equal(NeuralMemory(6, 2, loss="mse").double()(seq)[0], summed(seq)[0])
    with pytest.raises(ValueError, match=r"loss must be one of 'cosine', 'dot', .* number as in 'lp:4', got 'hinge'"):
        NeuralMemory(6, loss="hinge")
    with pytest.raises(ValueError, match="loss and summed_loss exclude each other"):
        NeuralMemory(6, loss="mse", summed_loss=True)
    with pytest.raises(ValueError, match="must be new, got 'mse'"):
        losses.register_loss("mse", losses.mean_squared_error)
