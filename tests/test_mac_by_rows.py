"""Rows of the transformer at positions of their own, decoded as one batch, are each what they are alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.mutants.breaking import wrapped
from tests.support.mac_configurations import build
from tests.test_decoding import EXACT, LENGTHS, Talk, alone, batch_of, graphs, texts_of
from titans_pytorch import ConversationPool, MemoryAsContextTransformer
from titans_pytorch.decoding import RowBatch
from titans_pytorch.decoding import due as due_file
from titans_pytorch.mac import by_rows as by_rows_file
from titans_pytorch.mac.by_rows import MACByRows
from titans_pytorch.mac.stack import Stack

__all__ = ["graphs"]

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "long-term and persistent tokens": dict(num_longterm_mem_tokens=4, num_persist_mem_tokens=2),
    "chunks across segments": dict(num_longterm_mem_tokens=1, neural_memory_segment_len=5, batches=2),
    "short chunks": dict(num_longterm_mem_tokens=4, neural_memory_segment_len=2, batches=1),
    "sliding": dict(sliding_window_attn=True, num_longterm_mem_tokens=1, num_persist_mem_tokens=2),
    "sliding, long chunks": dict(sliding_window_attn=True, neural_memory_segment_len=9),
    "gates of attention": dict(neural_mem_gate_attn_output=True, num_longterm_mem_tokens=1),
    "one stream, one memory": dict(num_residual_streams=1, neural_memory_layers=(2,), num_persist_mem_tokens=2),
    "no memory": dict(neural_memory_layers=(), num_longterm_mem_tokens=1),
    "two heads": dict(memory="two heads", num_longterm_mem_tokens=1, neural_memory_segment_len=2, batches=2),
    "gated transition": dict(memory="gated transition", neural_memory_segment_len=2, batches=1),
    "lookahead": dict(memory="lookahead", neural_memory_segment_len=2),
    "two updates": dict(memory="two updates", neural_memory_segment_len=2, batches=2),
}


def run(rows: RowBatch, texts: list[Tensor], count: int) -> Tensor:
    """Logits of the next tokens of texts, one by one.  -> (b count v)"""
    found = []
    for i in range(count):
        ids = torch.cat([text[0, n + i : n + i + 1] for text, n in zip(texts, LENGTHS, strict=True)])
        found.append(rows.run(ids))
    return torch.stack(found, dim=1)


def rows_of(model: Any, texts: list[Tensor]) -> RowBatch:
    return batch_of(model, [text[:, :length] for text, length in zip(texts, LENGTHS, strict=True)])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_rows_of_the_transformer_are_each_as_alone(name: str) -> None:
    """20 tokens, over the borders of segments, chunks and batches; then states are taken out and go on."""
    model, texts = build(**CASES[name]), texts_of(29)
    assert model.why_by_groups == ""
    rows, expected = rows_of(model, texts), alone(model, texts)
    assert_close(run(rows, texts, 20), expected[:, :20], **EXACT)
    for row, (text, length) in enumerate(zip(texts, LENGTHS, strict=True)):
        more, after = model.logits_and_state(text[:, length + 20 :], rows.state(row))
        assert_close(more[0], expected[row, 20:], **EXACT)
        assert after.num_tokens == length + 29


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_what_is_worked_out_before_changes_nothing(name: str) -> None:
    model, texts = build(**CASES[name]), texts_of(8)
    rows = rows_of(model, texts)
    rows.model = rows.model.prepared()
    assert_close(run(rows, texts, 8), alone(model, texts), **EXACT)


@pytest.mark.parametrize("name", ["long-term and persistent tokens", "sliding"])
@torch.no_grad()
def test_conversations_with_the_transformer_are_each_as_alone(name: str) -> None:
    """They come and go, and some of them begin a segment where others do not."""
    talk = Talk(build(**CASES[name]))
    for _ in range(9):
        talk.open()
    talk.say({each: talk.random.randint(1, 12) for each in talk.texts})
    for _ in range(6):
        going = talk.random.sample(sorted(talk.texts), talk.random.choice([3, 8]))
        for _ in range(talk.random.randint(1, 4)):
            talk.say(dict.fromkeys(going, 1))
    talk.check()


@torch.no_grad()
def test_a_pool_goes_on_with_parameters_as_they_are_now() -> None:
    """Persistent and long-term tokens, positions and connections among them; and with parts that are new."""
    model = build(num_longterm_mem_tokens=1, num_persist_mem_tokens=2)
    talk = Talk(model)
    talk.say({talk.open(): length for length in LENGTHS})
    talk.say(dict.fromkeys(talk.texts, 1))
    states, ids = {each: talk.pool.state(each) for each in talk.texts}, torch.tensor([3])
    for parameter in model.parameters():
        parameter.add_(0.1)
    model.norm = nn.RMSNorm(8).double()
    for _ in range(4):  # over the beginning of a segment
        found = talk.pool.advance(dict.fromkeys(talk.texts, ids))
        for each in talk.texts:
            expected, states[each] = model.logits_and_state(ids[None], states[each])
            assert_close(found[each], expected[0, -1], **EXACT)


@torch.no_grad()
def test_rows_of_half_precision_and_of_inference_mode_go_on() -> None:
    model, texts = build(**CASES["long-term and persistent tokens"]).bfloat16(), texts_of(6)
    with torch.inference_mode():
        rows, expected = rows_of(model, texts), alone(model, texts)
        found = [run(rows, texts, 1)]
    moved = [torch.cat((text[:, 1:], text[:, :1]), dim=1) for text in texts]  # as one token of each has been read
    found.append(run(rows, moved, 4))
    assert found[0].dtype == torch.bfloat16
    assert_close(torch.cat(found, dim=1), expected[:, :5], rtol=0.1, atol=0.2)


@torch.no_grad()
def test_what_does_not_fit_is_refused_in_a_sentence() -> None:
    model, text = build(num_longterm_mem_tokens=1), texts_of(0)[1]
    _, one = model.logits_and_state(text[:, :5])
    _, other = build(num_longterm_mem_tokens=1, neural_memory_layers=(2,)).logits_and_state(text[:, :5])
    how: dict[str, Any] = dict(temperature=0, show_progress=False, use_cache=True, compile=True)
    with pytest.raises(ValueError, match="cache must be of this model's 3 layers, 3 of them with a memory, got"):
        model.sample(text[:, :1], 3, cache=other, **how)
    with pytest.raises(ValueError, match="must"):
        model.sample(text[:, :1].repeat(2, 1), 3, cache=one, **how)


def test_a_layer_in_a_wrapper_trains() -> None:
    class Wrapped(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, *arguments: Any) -> Any:
            return self.layer(*arguments)

    model, ids = build(), texts_of(0)[1]
    expected = model.loss(ids)
    model.layers[1] = Wrapped(model.layers[1])
    assert_close(model.loss(ids), expected)


@pytest.mark.parametrize("name", ["long-term and persistent tokens", "short chunks", "sliding"])
def test_padded_prompts_of_the_transformer_are_sampled_as_one_batch(name: str) -> None:
    model, prompt = build(**CASES[name]), texts_of(0)[1][:, :9].repeat(3, 1)
    mask = torch.arange(9) >= torch.tensor([[4], [0], [7]])
    how: dict[str, Any] = dict(temperature=0, use_cache=True, show_progress=False)
    found = model.sample(prompt, 20, attention_mask=mask, **how)
    for row in range(3):
        own = prompt[row : row + 1, mask[row]]
        assert torch.equal(found[row : row + 1], model.sample(own, own.shape[1] + 11, **how))


# ---- compiled steps


@pytest.mark.parametrize(
    "name, num_graphs",
    [("long-term and persistent tokens", 1), ("short chunks", 2), ("no memory", 1), ("sliding, long chunks", 2)],
)
def test_steps_of_the_transformer_are_captured_once(name: str, num_graphs: int, graphs: Callable[[], int]) -> None:
    """Where chunks are windows they end with a long-term token, which no step reads."""
    model, prompt = build(**CASES[name]), texts_of(0)[1][:, :5].repeat(3, 1)
    how: dict[str, Any] = dict(temperature=0, use_cache=True, show_progress=False)
    found = model.sample(prompt, 21, compile=True, **how)
    assert torch.equal(found, model.sample(prompt, 21, **how))
    assert graphs() == num_graphs
    assert torch.equal(found, model.sample(prompt, 21, compile=True, **how))
    assert graphs() == num_graphs


def test_a_pool_of_captured_steps_is_as_alone(graphs: Callable[[], int]) -> None:
    """Of rows of which some begin a segment where others do not."""
    talk = Talk(build(**CASES["long-term and persistent tokens"]), compile=True)
    talk.say({talk.open(): length for length in LENGTHS})
    for _ in range(7):
        talk.say(dict.fromkeys(talk.texts, 1))
    assert graphs() == 1
    talk.check()


def test_the_end_of_a_long_chunk_is_not_compiled(graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_pytorch.decoding import compiled

    monkeypatch.setattr(compiled, "RARE", 2)
    model, prompt = build(), texts_of(0)[1][:, :5]
    how: dict[str, Any] = dict(temperature=0, use_cache=True, show_progress=False)
    assert torch.equal(model.sample(prompt, 15, compile=True, **how), model.sample(prompt, 15, **how))
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.timeout(900)  # two graphs of a whole model: 155 s of compiling where nothing else runs
@pytest.mark.parametrize("name", ["long-term and persistent tokens", "two heads", "sliding"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_samples_of_the_transformer_are_samples(name: str) -> None:
    model, prompt = build(**CASES[name]), texts_of(0)[1][:, :5].repeat(3, 1)
    how: dict[str, Any] = dict(temperature=0, use_cache=True, show_progress=False)
    assert torch.equal(model.sample(prompt, 21, compile=True, **how), model.sample(prompt, 21, **how))


# ---- what goes by groups


def test_a_sentence_says_why_a_transformer_goes_by_groups() -> None:
    begins = "rows are decoded by groups of equal length, as MemoryAsContextTransformer "
    model = build()
    assert ConversationPool(model).why_by_groups == ""
    for option in ("neural_memory_qkv_receives_diff_views", "neural_mem_weight_residual"):
        given_more = build(**{option: True})
        assert given_more.why_by_groups == begins + "has a memory that is given more than its tokens"
    mixing = build(memory="attention")
    assert mixing.why_by_groups == begins + "has a memory model that mixes the tokens of a chunk"
    with pytest.raises(ValueError, match="compile needs a model whose rows are decoded as one batch, but rows are"):
        mixing.sample(texts_of(0)[0], 5, use_cache=True, show_progress=False, compile=True)
    with pytest.raises(ValueError, match="compile needs the states of use_cache=True, got use_cache=False"):
        model.sample(texts_of(0)[0], 5, show_progress=False, compile=True)
    layer: Any = model.layers[0]
    handle = layer.register_forward_hook(lambda *_: None)
    assert model.why_by_groups == begins + "has hooks around its layers, which would not be called"
    handle.remove()
    positions = model.axial_pos_emb
    model.axial_pos_emb = nn.Identity()  # type: ignore[assignment]
    assert model.why_by_groups == begins + "embeds positions in a way of its own"
    model.axial_pos_emb = positions
    layer.attention.scale = 0.5
    assert model.why_by_groups == begins + "has attention of another kind"
    layer.attention.scale = None
    assert model.why_by_groups == ""

    class Own(MemoryAsContextTransformer):
        def logits(self, hidden: Tensor) -> Tensor:
            return super().logits(hidden)

    own = Own(num_tokens=11, dim=8, depth=1, segment_len=3, dim_head=4, heads=2)
    assert own.why_by_groups == "rows are decoded by groups of equal length, as Own reads tokens in a way of its own"
    model.layers[1] = nn.Sequential()
    assert model.why_by_groups == begins + "has layers that were replaced"


# ---- broken on purpose

Patch = Callable[[pytest.MonkeyPatch], None]


def step_becomes(change: Callable[[Any], Any]) -> Patch:
    original = due_file.TokenStep.of
    return lambda patcher: patcher.setattr(
        due_file.TokenStep, "of", staticmethod(lambda *args: change(original(*args)))
    )


def wraps(kind: Any, name: str, change: Callable[..., Any]) -> Patch:
    return lambda patcher: wrapped(patcher, kind, name, change)


MUTANTS: dict[str, Patch] = {
    "long-term tokens are left out": wraps(MACByRows, "read_between", lambda *_: None),
    "all rows begin a segment": wraps(
        MACByRows, "read_between", lambda original, self, rows, p: original(self, rows, [min(p) // 3 * 3] * len(p))
    ),
    "long-term tokens go to other rows": lambda patcher: patcher.setattr(
        by_rows_file,
        "write_rows",
        lambda kept, rows, new, batch, write=by_rows_file.write_rows: write(
            kept, [(row + 1) % batch for row in rows], new, batch
        ),
    ),
    "positions are embedded as those of the first row": step_becomes(
        lambda step: step._replace(positions=step.positions[:1].expand_as(step.positions))
    ),
    "windows show what is not there": step_becomes(lambda step: step._replace(hidden=torch.zeros_like(step.hidden))),
    "values of the first attention are not mixed in": wraps(
        by_rows_file.MACLayerByRows,
        "advance",
        lambda original, self, streams, values, *rest: original(self, streams, None, *rest),
    ),
    "long-term tokens are placed one too far": wraps(
        Stack, "through_layers", lambda original, self, x, place, befores: original(self, x, place + 1, befores)
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
@torch.no_grad()
def test_a_broken_step_of_the_transformer_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = build(**CASES["long-term and persistent tokens"]), texts_of(9)
    expected, rows = alone(model, texts), rows_of(model, texts)
    MUTANTS[name](monkeypatch)
    try:
        found = run(rows, texts, 9)
    except (RuntimeError, ValueError):
        return
    assert not torch.allclose(found, expected, **EXACT)
