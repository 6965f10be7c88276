"""Rows at positions of their own, decoded as one batch, are each what they are alone."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from tests.mutants.breaking import wrapped
from tests.support.sequence_modules import READERS
from tests.support.titans_configurations import CASES, VARIANTS, build, config_of, random_ids
from tests.test_ragged import model_of
from titans_pytorch import ConversationPool, NeuralMemory, NeuralMemState, RaggedState, TitansMAG, writes_off
from titans_pytorch.decoding import Cadence, Due, RowBatch, compiled
from titans_pytorch.decoding.memory import why_not_memory_by_rows

EXACT = dict(rtol=1e-9, atol=1e-9)
LENGTHS = (3, 17, 8, 1, 12, 9)


def batch_of(model: Any, texts: list[Tensor]) -> RowBatch:
    """Texts (1 n) of different lengths, read one by one, as rows."""
    return RowBatch.of(model.by_rows(), [model.logits_and_state(text)[1] for text in texts])


def texts_of(num_more: int) -> list[Tensor]:
    return [random_ids(1, length + num_more, seed=length) for length in LENGTHS]


def alone(model: Any, texts: list[Tensor]) -> Tensor:
    """Logits of the tokens after the first so many of each text, which is read alone.  -> (b n v)"""
    found = [model.logits_and_state(text)[0] for text in texts]
    return torch.cat([logits[:, length:] for logits, length in zip(found, LENGTHS, strict=True)])


@pytest.mark.parametrize("variant, name", CASES)
@torch.no_grad()
def test_rows_at_positions_of_their_own_are_each_as_alone(variant: str, name: str) -> None:
    """20 tokens, over the borders of chunks, batches, segments and windows; then states are taken out and go on."""
    model, texts = build(variant, name), texts_of(29)
    assert model.why_by_groups == ""
    rows = batch_of(model, [text[:, :length] for text, length in zip(texts, LENGTHS, strict=True)])
    steps = [torch.cat([text[0, n + i : n + i + 1] for text, n in zip(texts, LENGTHS, strict=True)]) for i in range(20)]
    found = torch.stack([rows.run(ids) for ids in steps], dim=1)
    expected = alone(model, texts)
    assert_close(found, expected[:, :20], **EXACT)
    assert rows.positions == [length + 20 for length in LENGTHS]
    for row, (text, length) in enumerate(zip(texts, LENGTHS, strict=True)):
        more, after = model(text[:, length + 20 :], rows.state(row))
        assert_close(more[0], expected[row, 20:], **EXACT)
        assert after.num_tokens == length + 29


OTHERS: dict[str, dict[str, Any]] = {
    "yaad": dict(memory_loss="yaad", momentum=False),
    "moneta": dict(memory_loss="lp:3", memory_rule="lq:4", momentum=False),
    "memora, lengths kept": dict(memory_rule="kl", momentum=False, memory_options=dict(keep_lengths=True)),
    "windows, thresholds": dict(memory_loss="yaad", memory_options=dict(window=2)),
    "windows": dict(memory_options=dict(window=3)),
    "windows, powers, gates of parameters": dict(
        memory_options=dict(window=2, key_powers=2, per_parameter_gates=True, per_parameter_lr_modulation=True)
    ),
    "atlas": dict(memory_rule="atlas", memory_options=dict(window=3)),
}


@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_rows_of_other_rules_are_each_as_alone(name: str) -> None:
    """Some of which look back at chunks of a row's own."""
    model, texts = build("lmm", **OTHERS[name]), texts_of(15)
    assert model.why_by_groups == ""
    rows = batch_of(model, [text[:, :length] for text, length in zip(texts, LENGTHS, strict=True)])
    steps = [torch.cat([text[0, n + i : n + i + 1] for text, n in zip(texts, LENGTHS, strict=True)]) for i in range(9)]
    found, expected = torch.stack([rows.run(ids) for ids in steps], dim=1), alone(model, texts)
    assert_close(found, expected[:, :9], **EXACT)
    for row, (text, length) in enumerate(zip(texts, LENGTHS, strict=True)):
        assert_close(model(text[:, length + 9 :], rows.state(row))[0][0], expected[row, 9:], **EXACT)


def test_rows_know_all_that_a_state_keeps() -> None:
    """What is new in a state has to be carried by rows, or memories that keep it go by groups, as those with a span."""
    carried = "seq_index weights cache_store_segment states updates cache_store_mask group tails recent"
    assert set(NeuralMemState._fields) == {*carried.split(), "span"}
    on_keys = NeuralMemory(8, 4, qk_projection="chunk")
    assert why_not_memory_by_rows(on_keys) == "has a memory whose queries are projected on keys"


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rows_are_joined_and_selected_at_any_time(variant: str) -> None:
    model, texts = build(variant), texts_of(6)
    heads = [text[:, :length] for text, length in zip(texts, LENGTHS, strict=True)]
    rows = RowBatch.join([batch_of(model, heads[:2]), batch_of(model, heads[2:])]).select([4, 1, 0])
    for i in range(6):
        found = rows.run(torch.cat([texts[row][0, LENGTHS[row] + i : LENGTHS[row] + i + 1] for row in (4, 1, 0)]))
        assert_close(found, alone(model, texts)[[4, 1, 0], i], **EXACT)


@torch.no_grad()
def test_states_of_several_sequences_become_rows() -> None:
    model = build("mag")
    many, one = random_ids(3, 9), random_ids(1, 6, seed=1)
    rows = RowBatch.of(model.by_rows(), [model(many[:, :8])[1], model(one[:, :5])[1]])
    found = rows.run(torch.cat((many[:, 8], one[:, 5])))
    assert_close(found, torch.cat((model(many)[0][:, -1], model(one)[0][:, -1])), **EXACT)


# ---- pools


class Talk:
    """A pool with every token that its conversations have read, and the logits that they were answered with."""

    def __init__(self, model: Any, **options: Any) -> None:
        self.model, self.pool = model, ConversationPool(model, **options)
        self.texts: dict[int, list[int]] = {}
        self.answers: dict[int, dict[int, Tensor]] = {}
        self.random = Random(0)

    def open(self) -> int:
        number = self.pool.open()
        self.texts[number], self.answers[number] = [], {}
        return number

    def say(self, counts: dict[int, int]) -> None:
        """So many random tokens for each of some conversations."""
        more = {each: [self.random.randrange(11) for _ in range(count)] for each, count in counts.items()}
        for each, logits in self.pool.advance({each: torch.tensor(ids) for each, ids in more.items()}).items():
            self.texts[each] = [*self.texts[each], *more[each]]
            self.answers[each] = self.answers[each] | {len(self.texts[each]) - 1: logits}

    def check(self) -> None:
        """All answers are those of the text alone."""
        for number, answers in self.answers.items():
            if not answers:
                continue
            expected = self.model.logits_and_state(torch.tensor([self.texts[number]]))[0][0]
            assert_close(torch.stack(list(answers.values())), expected[list(answers)], **EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_64_conversations_that_come_and_go_are_each_as_alone(variant: str) -> None:
    talk = Talk(build(variant))
    random = talk.random
    for _ in range(64):
        talk.open()
    talk.say({each: random.randint(1, 25) for each in talk.texts})
    for _ in range(14):
        going = random.sample(sorted(talk.texts), random.choice([5, 30, 60]))
        for _ in range(random.randint(1, 4)):
            talk.say({each: 1 if random.random() < 0.97 else random.randint(2, 5) for each in going})
    assert sum(map(len, talk.answers.values())) > 800
    talk.check()


@torch.no_grad()
def test_conversations_that_go_on_together_stay_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(build("mag"))
    talk.say({talk.open(): length for length in LENGTHS})
    talk.say(dict.fromkeys(talk.texts, 1))

    def refused(*_: Any) -> None:
        raise AssertionError("rows were moved, or groups read")

    for name in ("of", "join", "select", "state"):
        monkeypatch.setattr(RowBatch, name, refused)
    monkeypatch.setattr(type(talk.model), "hidden_states", refused)
    monkeypatch.setattr(type(talk.model), "why_by_groups", "")
    for _ in range(3):
        talk.say(dict.fromkeys(reversed(talk.texts), 1))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_points_forks_and_snapshots_of_rows_are_values(variant: str) -> None:
    """Whatever a batch does afterwards."""
    talk = Talk(build(variant))
    pool = talk.pool
    talk.say({talk.open(): length for length in LENGTHS})
    talk.say(dict.fromkeys(talk.texts, 1))
    one, two, three, *_ = talk.texts
    point, data, before = pool.keep(one), pool.snapshot(two), {each: list(text) for each, text in talk.texts.items()}
    fork = pool.fork(three)
    talk.texts[fork], talk.answers[fork] = before[three], {}
    for _ in range(9):
        talk.say({each: 1 for each in talk.texts if each != fork})
    talk.check()
    pool.rollback(one, point)
    talk.texts[one], talk.answers[one] = before[one], {}
    again = pool.restore(data)
    talk.texts[again], talk.answers[again] = before[two], {}
    assert [pool.num_tokens(each) for each in (one, again, fork)] == [len(before[each]) for each in (one, two, three)]
    for _ in range(5):
        talk.say(dict.fromkeys(talk.texts, 1))
    talk.check()


@torch.no_grad()
def test_a_batch_is_not_kept_for_the_sake_of_one_row() -> None:
    talk = Talk(build("mag"))
    talk.say({talk.open(): length for length in LENGTHS})
    talk.say(dict.fromkeys(talk.texts, 1))
    first, *others = talk.texts
    talk.say(dict.fromkeys(others, 1))
    point: Any = talk.pool.points[first]
    assert point.batch.batch == 1
    talk.say({first: 1})
    talk.say({first: 3, others[0]: 1})
    talk.check()


@torch.no_grad()
def test_rows_of_inference_mode_go_on_outside_of_it() -> None:
    talk = Talk(build("mac"))
    with torch.inference_mode():
        talk.say({talk.open(): length for length in LENGTHS})
        talk.say(dict.fromkeys(talk.texts, 1))
    talk.say(dict.fromkeys(talk.texts, 1))
    talk.check()


# ---- prompts of different lengths


@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_prompts_are_sampled_as_one_batch(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt, runs = build(variant), random_ids(3, 9), []
    mask = torch.arange(9) >= torch.tensor([[4], [0], [7]])
    wrapped(monkeypatch, RowBatch, "run", lambda original, *args: runs.append(1) or original(*args))
    found = model.sample(prompt, 22, temperature=0, attention_mask=mask)
    assert len(runs) == 12
    for row in range(3):
        own = prompt[row : row + 1, mask[row]]
        assert torch.equal(found[row : row + 1], model.sample(own, own.shape[1] + 13, temperature=0))
    monkeypatch.setattr(type(model), "by_rows", lambda self, compiles=False: None)
    assert torch.equal(found, model.sample(prompt, 22, temperature=0, attention_mask=mask))
    assert len(runs) == 12


@torch.no_grad()
def test_a_ragged_state_keeps_the_order_of_its_rows() -> None:
    model, texts = build("mal"), texts_of(4)
    states = [model(text[:, :length])[1] for text, length in zip(texts, LENGTHS, strict=True)]
    first = torch.cat([text[:, n : n + 1] for text, n in zip(texts, LENGTHS, strict=True)])
    found = model.sample(first, 4, temperature=0, state=RaggedState.join(states))
    for row, state in enumerate(states):
        assert torch.equal(found[row : row + 1], model.sample(first[row : row + 1], 4, temperature=0, state=state))


# ---- compiled steps


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """How many graphs were made, which nothing compiles: they run as they were captured."""
    torch._dynamo.reset()
    captured = torch.compile(compiled.logits_of, fullgraph=True, backend="eager")
    monkeypatch.setattr(compiled, "compiled_step", lambda device: captured)
    before = counters["stats"]["unique_graphs"]
    return lambda: int(counters["stats"]["unique_graphs"] - before)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mag", "mac"])
@torch.no_grad()
def test_no_token_and_no_pool_captures_a_graph_again(variant: str, graphs: Callable[[], int]) -> None:
    """One where no chunk ends and one where some do; with segments two more, where some of those end."""
    sizes = dict(depth=1, window=6, memory_chunk=4, memory_refresh=8)
    talk = Talk(build(variant, **sizes), compile=True)
    talk.say({talk.open(): length for length in LENGTHS})
    for _ in range(13):
        talk.say(dict.fromkeys(talk.texts, 1))
    assert graphs() == (4 if variant == "mac" else 2)
    talk.check()
    other = Talk(build(variant, **sizes), compile=True)
    other.say({other.open(): length + 1 for length in LENGTHS})
    other.say(dict.fromkeys(other.texts, 1))
    assert graphs() == (4 if variant == "mac" else 2)
    other.check()


def test_samples_of_compiled_steps_are_samples(graphs: Callable[[], int]) -> None:
    model, prompt = build("mag", depth=1, memory_refresh=None), random_ids(3, 5)
    found = model.sample(prompt, 21, temperature=0, compile=True)
    assert torch.equal(found, model.sample(prompt, 21, temperature=0))
    assert graphs() == 2
    assert torch.equal(found, model.sample(prompt, 21, temperature=0, compile=True))
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiled_samples_are_samples(variant: str) -> None:
    model, prompt = build(variant), random_ids(3, 9)
    mask = torch.arange(9) >= torch.tensor([[4], [0], [7]])
    found = model.sample(prompt, 22, temperature=0, attention_mask=mask, compile=True)
    assert torch.equal(found, model.sample(prompt, 22, temperature=0, attention_mask=mask))


def test_what_cannot_be_compiled_is_refused() -> None:
    model = TitansMAG(11, config_of("plain", memory_model="attention"))
    with pytest.raises(ValueError, match="compile needs a model whose rows are decoded as one batch, but rows are"):
        model.sample(random_ids(1, 3), 5, compile=True)
    with pytest.raises(ValueError, match="compile needs a model whose rows are decoded as one batch, but rows are"):
        ConversationPool(model, compile=True)
    with pytest.raises(ValueError, match="compile needs the states of use_cache=True, got use_cache=False"):
        build("mag").sample(random_ids(1, 3), 5, compile=True, use_cache=False)


# ---- what goes by groups


def test_a_sentence_says_why_a_model_goes_by_groups() -> None:
    model = build("mag")
    assert ConversationPool(model).why_by_groups == ""
    begins = "rows are decoded by groups of equal length, as "
    plain: Any = model_of("AttentionTransformer, full")
    assert plain.why_by_groups == begins + "AttentionTransformer has no way to decode rows"
    mixing = TitansMAG(11, config_of("plain", memory_model="attention"))
    assert mixing.why_by_groups == begins + "TitansMAG has a memory model that mixes the tokens of a chunk"
    with writes_off(model):
        assert model.why_by_groups == begins + "TitansMAG has a memory whose writes are off"
    handle = model.layers[0].register_forward_hook(lambda *_: None)
    assert model.why_by_groups == begins + "TitansMAG has hooks around its blocks, which would not be called"
    handle.remove()
    assert model.why_by_groups == ""

    class Own(TitansMAG):
        def hidden_states(self, ids: Tensor, state: Any = None) -> Any:
            return super().hidden_states(ids, state)

    assert Own(11, config_of("plain")).why_by_groups == begins + "Own reads tokens in a way of its own"
    model.layers[1].mixer.memory = nn.Identity()
    assert model.why_by_groups == begins + "TitansMAG has a memory of another kind, Identity"
    model.layers[1].mixer = nn.Sequential()
    assert model.why_by_groups == begins + "TitansMAG has a mixer of another kind, Sequential"
    model.layers[1] = nn.Sequential()
    assert model.why_by_groups == begins + "TitansMAG has blocks that were replaced"


@pytest.mark.parametrize("name", ["MemoryAsContextTransformer, everything", "mixing"])
@torch.no_grad()
def test_what_goes_by_groups_is_as_alone_too(name: str) -> None:
    model: Any = model_of(name) if name in READERS else build("mag", memory_model="attention")
    assert model.why_by_groups
    talk = Talk(model)
    talk.say({talk.open(): length for length in LENGTHS})
    for _ in range(4):
        talk.say(dict.fromkeys(talk.texts, 1))
    talk.check()


@torch.no_grad()
def test_conversations_go_by_groups_while_writes_are_off_and_afterwards_as_they_can() -> None:
    """A state that knows of tokens that were not stored is none of a row."""
    model = build("mag")
    talk = Talk(model)
    talk.say({talk.open(): length for length in LENGTHS})
    talk.say(dict.fromkeys(talk.texts, 1))
    talk.check()
    point = talk.pool.state(1)
    with writes_off(model):
        ids = torch.tensor([3])
        found = talk.pool.advance({1: ids, 2: ids})
        expected, _ = model(ids[None], point)
    assert_close(found[1], expected[0, -1], **EXACT)
    expected, _ = model(ids[None], talk.pool.state(1))
    assert_close(talk.pool.advance({1: ids, 2: ids, 3: ids})[1], expected[0, -1], **EXACT)


# ---- what is due


@pytest.mark.parametrize("is_segmented", [False, True])
def test_what_is_due_is_what_counting_says(is_segmented: bool) -> None:
    before = 0 if is_segmented else 2
    cadence = Cadence(
        window=5,
        is_segmented=is_segmented,
        has_context=is_segmented,
        num_persistent=2,
        num_stored_before=before,
        chunk=3,
        refresh=6,
    )
    for position in range(40):
        due = Due.of(cadence, [position])
        seen = before + position + 1  # this token included
        assert bool(due.chunks) == (seen % 3 == 0)
        assert due.renewals == ([seen % 6 == 0] if seen % 3 == 0 else [])
        assert bool(due.segments) == (is_segmented and position % 5 == 4)
        assert due.slots == [position % 5]
        kept = cadence.slots(position)
        assert len(kept) == (position % 5 if is_segmented else min(position, 4))
        assert due.slots[0] not in kept
