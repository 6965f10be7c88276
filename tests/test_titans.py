"""The family: pieces equal the whole, nothing leaks, the memory reaches; it trains, saves and says what is wrong."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from tests.support.mac_configurations import splits
from tests.support.streams import in_pieces
from tests.support.titans_configurations import (
    CASES,
    DIM,
    MODELS,
    NUM_TOKENS,
    PAPER,
    SMALL,
    VARIANTS,
    build,
    build_backbone,
    config_of,
    disturbed,
    random_ids,
    random_inputs,
)
from titans_pytorch import NeuralMemory, TitansBackbone, TitansConfig, TitansState, audit, load_state, save_state
from titans_pytorch.titans.config import PAPER_TOKENS, SIZES, preset
from titans_pytorch.training.models import PaperModel
from titans_pytorch.training.next_token import NextTokenLoss

TOLERANCE = dict(rtol=1e-9, atol=1e-9)
GREEDY = dict(temperature=0.0)


def stream(model: Any, piece: Tensor, state: Any) -> tuple[Tensor, Any]:
    return model(piece, state)


def tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (tuple, list)) else ()
    return [tensor for child in children for tensor in tensors(child)]


# ---- pieces


@pytest.mark.parametrize("variant, name", CASES)
def test_any_pieces_give_what_one_call_gives(variant: str, name: str) -> None:
    model, ids = build(variant, name), random_ids(2, 19)
    with torch.no_grad():
        whole, last = model(ids)
        for lengths in ((1,) * 19, (5, 1, 7, 6)):
            outputs, state = in_pieces(model, ids, lengths)
            assert_close(outputs, whole, **TOLERANCE)
            for left, right in zip(tensors(state), tensors(last), strict=True):
                assert_close(left, right, **TOLERANCE)


def check_pieces(data: st.DataObject) -> None:
    variant, chunk = data.draw(st.sampled_from(VARIANTS)), data.draw(st.integers(1, 5))
    changes: dict[str, Any] = dict(
        window=data.draw(st.integers(1, 7)),
        memory_chunk=chunk,
        memory_refresh=data.draw(st.sampled_from([None, chunk, 2 * chunk])),
        num_persistent=data.draw(st.integers(0, 3)),
        memory_heads=data.draw(st.sampled_from([1, 2])),
        conv_size=data.draw(st.sampled_from([None, 2, 4])),
        memory_options=data.draw(st.sampled_from([{}, PAPER, dict(gated_transition=True)])),
    )
    if changes["memory_refresh"] is None and "gated_transition" in changes["memory_options"]:
        changes["memory_options"] = {}  # there is no transition
    model, count = build(variant, seed=data.draw(st.integers(0, 99)), **changes), data.draw(st.integers(1, 30))
    ids = random_ids(2, count, seed=1)
    with torch.no_grad():
        whole, _ = model(ids)
        outputs, _ = in_pieces(model, ids, data.draw(splits(count)))
    assert_close(outputs, whole, **TOLERANCE)


@settings(max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_configuration_in_any_pieces(data: st.DataObject) -> None:
    check_pieces(data)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_many_more_configurations_in_any_pieces(data: st.DataObject) -> None:
    check_pieces(data)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_flow_through_the_state(variant: str) -> None:
    model, x = build_backbone(variant), random_inputs(2, 13)
    parameters = dict(model.named_parameters())
    probe = random_inputs(2, 13, seed=1)
    whole = torch.autograd.grad((model(x)[0] * probe).sum(), parameters.values())
    pieces = torch.autograd.grad((in_pieces(model, x, (5, 1, 7))[0] * probe).sum(), parameters.values())
    for name, left, right in zip(parameters, pieces, whole, strict=True):
        assert_close(left, right, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    detached = model(x[:, :5])[1].detach()
    assert not any(tensor.requires_grad for tensor in tensors(detached))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_inference_mode_has_read_goes_on_outside_of_it(variant: str) -> None:
    model, x = build_backbone(variant), random_inputs(2, 13)
    expected = model(x)[0][:, 6:]
    with torch.inference_mode():
        _, state = model(x[:, :6])
    with torch.no_grad():
        assert_close(model(x[:, 6:], state)[0], expected, rtol=1e-9, atol=1e-9)
    outputs, _ = model(x[:, 6:], state)
    assert_close(outputs, expected, rtol=1e-9, atol=1e-9)
    outputs.sum().backward()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loss_of_pieces_is_that_of_the_whole(variant: str) -> None:
    model, ids = build(variant), random_ids(2, 13)
    first, state = model.loss_and_state(ids[:, :6])
    second = model.loss(ids[:, 5:], state)
    assert_close((first * 5 + second * 7) / 12, model.loss(ids))


@pytest.mark.parametrize(
    "name",
    ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in ("never refreshed", "the paper's memory"))],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_with_the_state_are_those_without(variant: str, name: str) -> None:
    model = build(variant, name)
    for count in (1, 3, 4, 9):
        prompt = random_ids(2, count, seed=count)
        cached, plain = (model.sample(prompt, count + 6, use_cache=used, **GREEDY) for used in (True, False))
        assert cached.shape == (2, 6)
        assert torch.equal(cached, plain)
    with torch.no_grad():
        _, state = model(prompt[:, :5])
    assert torch.equal(model.sample(prompt[:, 5:], 10, state=state, **GREEDY), cached)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_does_not_grow(variant: str) -> None:
    model = build(variant)
    with torch.no_grad():
        sizes = []
        for count in (4 * 9 + 1, 4 * 90 + 1):
            _, state = model(random_ids(1, count))
            sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors(state)))
    assert sizes[1] <= sizes[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_states_can_be_selected_repeated_moved_saved_and_copied(variant: str, tmp_path: Path) -> None:
    model, ids = build(variant), random_ids(3, 14)
    with torch.no_grad():
        whole, _ = model(ids)
        _, state = model(ids[:, :9])
        save_state(state, tmp_path / "state.safetensors")
        stream = io.BytesIO()
        torch.save(state, stream)
        stream.seek(0)
        copies = [copy.deepcopy(state), load_state(tmp_path / "state.safetensors"), state.to("cpu")]
        copies.append(torch.load(stream, weights_only=False))
        for same in copies:
            assert_close(model(ids[:, 9:], same)[0], whole[:, 9:], **TOLERANCE)
        rows = torch.tensor([2, 0])
        assert_close(model(ids[rows, 9:], state.select(rows))[0], whole[rows, 9:], **TOLERANCE)
        doubled = state.repeat(2)
        assert doubled.batch == 6
        assert_close(model(ids[:, 9:].repeat_interleave(2, 0), doubled)[0][::2], whole[:, 9:], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("length", [8, 9])  # of a window of 4: between two segments, and inside one
@pytest.mark.parametrize("variant", VARIANTS)
def test_joined_states_go_on_as_the_batch_they_were_selected_from(variant: str, length: int) -> None:
    model, ids = build(variant), random_ids(3, 14)
    _, state = model(ids[:, :length])
    joined = TitansState.join([state.select([0]), state.select(slice(1, 3))])
    assert joined.batch == 3
    assert torch.equal(model(ids[:, length:], joined)[0], model(ids[:, length:], state)[0])
    with pytest.raises(ValueError, match="states must have seen equally many tokens, got 8 and 9"):
        TitansState.join([model(ids[:, :8])[1], model(ids[:, :9])[1]])


# ---- audit


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("chunk longer than window", "one memory, odd window", "the paper's memory")
        ),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_audit(variant: str, name: str) -> None:
    model = build_backbone(variant, name, depth=1)  # of which attention sees at most 5 tokens
    audit(model, random_inputs(2, 13), stream=stream, window=5, splits=[(1,) * 13, (5, 2, 6)]).check()


@pytest.mark.parametrize("variant", ["mac", "mag", "mal"])
def test_without_memory_nothing_is_seen_beyond_the_window(variant: str) -> None:
    model, x = build_backbone(variant, "no memory"), random_inputs(1, 20)
    changed = x.clone()
    changed[:, 0] += 1
    reach = SMALL["window"] if variant == "mac" else 2 * (SMALL["window"] - 1) + 1
    before, after = model(x)[0], model(changed)[0]
    assert not torch.allclose(before[:, reach - 1], after[:, reach - 1])
    assert torch.equal(before[:, reach:], after[:, reach:])


# ---- training


@pytest.mark.parametrize("name", ["the paper's memory", "no memory", "deep memory, no decay"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient(variant: str, name: str) -> None:
    model = build(variant, name)
    model.loss(random_ids(2, 15)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.abs().max() > 0] == []
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert all("to_decay_factor" in name for name in frozen)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns_in_bfloat16(variant: str) -> None:
    torch.manual_seed(0)
    model = MODELS[variant](NUM_TOKENS, config_of("plain", dim=16))
    optimizer, ids, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), random_ids(2, 10), []
    for _ in range(12):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_under_autocast(variant: str) -> None:
    model, ids = build(variant).float(), random_ids(2, 13)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        whole, pieces = model(ids)[0], in_pieces(model, ids, (4, 1, 8))[0]
    assert (pieces - whole).float().norm() < 0.05 * whole.float().norm()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_and_decoding_compile_without_graph_breaks(variant: str) -> None:
    torch._dynamo.reset()
    model, ids = build(variant), random_ids(2, 12)
    train = torch.compile(lambda ids: model.loss(ids), backend="eager", fullgraph=True)
    assert_close(train(ids), model.loss(ids))
    step = torch.compile(lambda ids, state: model(ids, state), backend="eager", fullgraph=True)
    with torch.no_grad():
        whole, _ = model(ids)
        _, state = model(ids[:, :10])
        for i in range(10, 12):  # within a chunk, and its end
            logits, state = step(ids[:, i : i + 1], state)
            assert_close(logits, whole[:, i : i + 1])


def test_masks_made_in_inference_can_be_trained_with() -> None:
    model, ids = build("mag", window=3), random_ids(1, 17)
    with torch.inference_mode():
        model(ids)
    model.loss(ids).backward()


# ---- saving


@pytest.mark.parametrize("variant", VARIANTS)
def test_models_can_be_saved_copied_and_pickled(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = config_of("the paper's memory")
    model = disturbed(MODELS[variant](NUM_TOKENS, config)).eval()
    ids = random_ids(1, 9)
    model.save_pretrained(tmp_path)
    loaded = MODELS[variant].from_pretrained(tmp_path)
    assert loaded.config == config
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for same in (loaded, copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(same(ids)[0], model(ids)[0])


def test_a_backbone_can_be_saved(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = TitansBackbone("mag", config_of("plain")).eval()
    model.save_pretrained(tmp_path)
    x = random_inputs(1, 7).float()
    assert torch.equal(TitansBackbone.from_pretrained(tmp_path)(x)[0], model(x)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trainer_trains_the_model_itself(variant: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    built = PaperModel(variant=variant, dim=32, depth=1, heads=2, memory_heads=2).build().eval()  # type: ignore[arg-type]
    assert type(built) is MODELS[variant]
    ids, trained = random_ids(2, 12), NextTokenLoss(built)
    built.save_pretrained(tmp_path)
    model = MODELS[variant].from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(trained(ids), model.loss(ids))
        assert trained(ids, per_token=True).shape == (2, 11)
        assert_close(trained(ids, per_token=True).mean(), model.loss(ids))
    assert len(built.layers) == 1


# ---- configs


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_presets_have_the_size_they_are_named_after(variant: str, size: str) -> None:
    config = TitansConfig.preset(size, variant)
    assert config == preset(size, variant)
    assert (config.depth, config.dim, config.heads) == SIZES[size][1:]
    one = TitansBackbone(variant, replace(config, depth=1))  # type: ignore[arg-type]
    block = sum(p.numel() for p in one.blocks.parameters())
    count = config.depth * block + 2 * PAPER_TOKENS * config.dim + config.dim
    assert abs(count / SIZES[size].parameters - 1) < 0.03


@pytest.mark.parametrize("variant", VARIANTS)
def test_some_blocks_may_have_no_memory(variant: str, tmp_path: Path) -> None:
    model, ids = build(variant, depth=3, memory_layers=(2,)), random_ids(2, 13)
    assert [block.mixer.memory is not None for block in model.backbone.blocks] == [False, True, False]
    whole, _ = model(ids)
    assert_close(in_pieces(model, ids, (5, 1, 7))[0], whole)

    bare = build(variant, depth=3, memory=False)  # a block without a memory is as in a model that has none
    for number in (0, 2):
        names = [set(each.backbone.blocks[number].state_dict()) for each in (model, bare)]
        assert names[0] == names[1]
    with pytest.raises(ValueError, match="in block 2, got one with"):
        model(ids, bare(ids)[1])

    _, state = model(ids[:, :6])
    save_state(state, tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(tmp_path / "model")
    assert loaded.config == model.config
    assert_close(loaded(ids[:, 6:], load_state(tmp_path / "state.safetensors"))[0], whole[:, 6:])


def test_all_blocks_have_a_memory_unless_it_is_said() -> None:
    named, unsaid = (build_backbone("mag", memory_layers=layers).state_dict() for layers in ((1, 2), None))
    assert all(torch.equal(value, named[name]) for name, value in unsaid.items())
    with pytest.raises(ValueError, match="memory_layers must hold numbers from 1 to the depth 2, got 3"):
        config_of("plain", memory_layers=(1, 3))


def test_switches_reach_the_memory() -> None:
    def memory(**changes: Any) -> NeuralMemory:
        return build_backbone("lmm", **changes).blocks[0].mixer.memory

    assert memory(momentum=False).to_momentum is None
    assert memory(conv_size=None).lookback == 0
    assert len(memory(memory_depth=1).initial_weights()) == 1
    assert len(memory(memory_depth=4).initial_weights()) == 4
    x = random_inputs(1, 4)
    assert memory(decay=False).to_decay_factor(x).sigmoid().max() < 1e-30
    assert build_backbone("lmm", memory=False).blocks[0].mixer.memory is None
    assert build_backbone("mag", num_persistent=0).blocks[0].mixer.persistent is None


@pytest.mark.parametrize(
    "wrong, error, words",
    [
        (dict(heads=3), ValueError, "heads must divide dim 8, got 3"),
        (dict(memory_heads=5), ValueError, "memory_heads must divide dim 8, got 5"),
        (dict(heads=8), ValueError, "dim / heads must be even"),
        (dict(window=0), ValueError, "window must be positive, got 0"),
        (dict(depth=1.5), TypeError, "depth must be a whole number"),
        (dict(gate="sum"), ValueError, "gate must be one of"),
        (dict(memory_refresh=3), ValueError, "memory_refresh must be a multiple of the store chunk size 2, got 3"),
        (dict(num_persistent=-1), ValueError, "num_persistent must be at least 0, got -1"),
        (dict(memory_options=dict(momentum=False)), ValueError, "memory_options must leave"),
        (dict(memory_options=3), TypeError, "memory_options must be a mapping"),
    ],
)
def test_refuses_wrong_configs(wrong: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        TitansConfig(**SMALL | wrong)


IDS = random_ids(2, 5)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m: m(IDS.float()), TypeError, "ids must be of dtype"),
        (lambda m: m(IDS + NUM_TOKENS), ValueError, "ids must be from 0 to 10"),
        (lambda m: m.loss(IDS[:, :1]), ValueError, "ids must have at least 2"),
        (lambda m: m(IDS, "state"), TypeError, "state must be a TitansState, got str"),
        (lambda m: m(IDS, m(IDS[:1])[1]), ValueError, "state must be of the input's batch size 2, got one of 1"),
        (lambda m: m(IDS, build("mag", depth=1)(IDS)[1]), ValueError, "state must be of this model's 2 blocks, got 1"),
        (lambda m: m(IDS, build("lmm")(IDS)[1]), ValueError, "state must be of a model like this one"),
        (lambda m: m.sample(IDS, 3), ValueError, "seq_len must be at least"),
        (lambda m: m.backbone(torch.zeros(2, 3, DIM + 1).double()), ValueError, "x must have 8 features"),
        (lambda m: TitansBackbone("max", m.config), ValueError, "variant must be one of 'mac', 'mag', 'mal', 'lmm'"),
        (lambda m: TitansBackbone("mac", dict(dim=3)), TypeError, "config must be a TitansConfig, got dict"),
        (lambda m: preset("2B", "mac"), ValueError, "size must be one of '170M'"),
    ],
)
def test_refuses_wrong_inputs(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(build("mag"))
