"""`generate` of transformers says what the library says, whatever way it decodes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

pytest.importorskip("transformers", reason="titans_pytorch.hf needs transformers, the extra hf")

from transformers import DynamicCache, pipeline
from transformers.generation.streamers import BaseStreamer

from tests.support.hf_models import NAMES, PAD, both, ids, left_padded, library_greedy, library_logits
from titans_pytorch.decoding import RowBatch
from titans_pytorch.hf import TitansCache

COUNT = 9


def continued(model: Any, prompt: Tensor, count: int = COUNT, **options: Any) -> Tensor:
    """The new tokens (b count) of `generate`, greedy unless it is said otherwise."""
    how: dict[str, Any] = dict(max_new_tokens=count, min_new_tokens=count, do_sample=False) | options
    answer: Tensor = model.generate(prompt, **how)
    return answer[:, prompt.shape[1] :]


@pytest.mark.parametrize("name", NAMES)
def test_greedy_is_that_of_the_library(name: str) -> None:
    library, model = both(name)
    prompt = ids(2, 7)
    expected = library_greedy(library, prompt, COUNT)
    assert torch.equal(continued(model, prompt), expected)
    assert torch.equal(continued(model, prompt, use_cache=False), expected)
    assert torch.equal(continued(model, prompt, prefill_chunk_size=3), expected)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_of_different_lengths_are_continued_as_each_alone(name: str) -> None:
    library, model = both(name)
    rows = [ids(length, seed=length) for length in (9, 4, 1, 4)]
    batch = left_padded(rows)
    expected = torch.cat([library_greedy(library, row[None], COUNT) for row in rows])
    assert torch.equal(continued(model, batch.pop("input_ids"), **batch), expected)


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_different_lengths_are_one_batch_until_a_state_is_needed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the model can; then a copy of the cache goes on from a state, with tokens of any number."""
    library, model = both(name)
    rows, runs, original = [ids(length, seed=length) for length in (9, 4, 1, 4)], [], RowBatch.read

    def read(self: RowBatch, x: Tensor) -> Tensor:
        runs.append(x.shape)
        return original(self, x)

    monkeypatch.setattr(RowBatch, "read", read)
    batch = left_padded(rows)
    mask = batch["attention_mask"]
    how: dict[str, Any] = dict(
        max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False, return_dict_in_generate=True
    )
    first = model.generate(**batch, **how)
    assert len(runs) == (0 if library.why_by_groups else COUNT - 1)
    more = torch.cat((first.sequences, ids(4, 3, seed=1)), dim=1)
    mask = torch.cat((mask, mask.new_ones(4, COUNT + 3)), dim=1)
    kept = copy.deepcopy(first.past_key_values)
    got = continued(model, more, past_key_values=kept, attention_mask=mask)
    own = [each[is_real.bool()] for each, is_real in zip(more, mask, strict=True)]
    assert torch.equal(got, torch.cat([library_greedy(library, each[None], COUNT) for each in own]))


def best_continuations(library: Any, prompt: Tensor, count: int, num_beams: int) -> Tensor:
    """Beam search as it is defined, reading everything again for each token.  prompt: (n) -> (num_beams count)"""
    beams = [(0.0, prompt)]
    for _ in range(count):
        longer = []
        for score, tokens in beams:
            scores = library_logits(library, tokens[None])[0, -1].log_softmax(dim=-1)
            longer += [(score + float(each), torch.cat((tokens, torch.tensor([n])))) for n, each in enumerate(scores)]
        beams = sorted(longer, key=lambda beam: -beam[0])[:num_beams]
    return torch.stack([tokens[len(prompt) :] for _, tokens in beams])


@pytest.mark.parametrize("name", NAMES)
def test_beams_are_those_of_a_search_without_cache(name: str) -> None:
    library, model = both(name)
    prompt = ids(2, 5)
    got = continued(model, prompt, 6, num_beams=3, num_return_sequences=3)
    expected = torch.cat([best_continuations(library, row, 6, 3) for row in prompt])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", NAMES)
def test_beams_of_padded_prompts(name: str) -> None:
    library, model = both(name)
    rows = [ids(5), ids(2, seed=1)]
    batch = left_padded(rows)
    expected = torch.cat([best_continuations(library, row, 5, 3)[:1] for row in rows])
    assert torch.equal(continued(model, batch.pop("input_ids"), 5, num_beams=3, **batch), expected)


@pytest.mark.parametrize("draft", [2, 5])
@pytest.mark.parametrize("name", NAMES)
def test_prompt_lookup_is_greedy(name: str, draft: int) -> None:
    library, model = both(name)
    prompt = ids(1, 3).repeat(1, 4)
    cache = Noting()
    got = continued(model, prompt, 14, prompt_lookup_num_tokens=draft, past_key_values=cache)
    assert torch.equal(got, library_greedy(library, prompt, 14))
    assert any(cache.taken_back), "nothing was taken back, so this test says nothing"


@pytest.mark.parametrize("name", NAMES)
def test_assisted_decoding_is_greedy(name: str) -> None:
    library, model = both(name)
    _, assistant = both("lmm", seed=1)
    prompt = ids(1, 6)
    cache = Noting()
    got = continued(model, prompt, 14, assistant_model=assistant, past_key_values=cache)
    assert torch.equal(got, library_greedy(library, prompt, 14))
    assert any(cache.taken_back)


class Noting(TitansCache):
    """Notes how many tokens were taken back."""

    def __init__(self) -> None:
        super().__init__()
        self.taken_back: list[int] = []

    def crop(self, tokens_to_remove: int) -> None:
        self.taken_back.append(-tokens_to_remove)
        super().crop(tokens_to_remove)


@pytest.mark.parametrize("name", NAMES)
def test_a_rollback_leaves_no_trace(name: str) -> None:
    """Random scripts of reading and taking back, against a fresh read of what is left."""
    _, model = both(name)
    generator = torch.Generator().manual_seed(5)
    for _ in range(4):
        cache, left, logits = TitansCache(), ids(2, 0), None
        cache.activate_past_recording()
        for _ in range(8):
            piece = ids(2, int(torch.randint(1, 5, (), generator=generator)), seed=left.shape[1])
            logits = model(piece, past_key_values=cache, use_cache=True, logits_to_keep=2).logits
            left = torch.cat((left, piece), dim=1)
            expected = model(left).logits[:, -logits.shape[1] :]
            assert_close(logits, expected, rtol=0, atol=1e-12)
            back = int(torch.randint(0, min(4, left.shape[1]), (), generator=generator))
            cache.crop(-back)
            left = left[:, : left.shape[1] - back]
            assert cache.get_seq_length() == left.shape[1]


@pytest.mark.parametrize("name", NAMES)
def test_sampling_is_the_same_with_cache_as_without(name: str) -> None:
    _, model = both(name)
    prompt = ids(3, 5)
    answers = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        answers.append(continued(model, prompt, do_sample=True, top_k=6, top_p=0.9, use_cache=use_cache))
    assert torch.equal(*answers)


@pytest.mark.parametrize("name", NAMES)
def test_a_returned_cache_goes_on(name: str) -> None:
    library, model = both(name)
    prompt = ids(2, 5)
    first = model.generate(prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = torch.cat((first.sequences, ids(2, 3, seed=1)), dim=1)
    kept = copy.deepcopy(first.past_key_values)
    assert torch.equal(continued(model, more, past_key_values=kept), library_greedy(library, more, COUNT))


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_does_not_grow(name: str) -> None:
    _, model = both(name)
    cache, sizes = TitansCache(), []
    for seed in range(3):
        model(ids(2, 24, seed=seed), past_key_values=cache, use_cache=True)
        sizes.append(sum(tensor.numel() for tensor in tensors(cache.state)))
    assert sizes[0] == sizes[1] == sizes[2]


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a state."""
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def test_embeddings_alone_are_continued() -> None:
    library, model = both("mag")
    prompt = ids(2, 5)
    got = model.generate(
        inputs_embeds=model.get_input_embeddings()(prompt), max_new_tokens=COUNT, min_new_tokens=COUNT, do_sample=False
    )
    assert torch.equal(got, library_greedy(library, prompt, COUNT))


def test_tokens_are_streamed() -> None:
    class Kept(BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    library, model = both("mag")
    prompt, kept = ids(1, 5), Kept()
    continued(model, prompt, streamer=kept)
    assert kept.tokens == [*prompt[0].tolist(), *library_greedy(library, prompt, COUNT)[0].tolist(), -1]


def test_a_sequence_ends_with_its_last_token() -> None:
    library, model = both("mag")
    prompt = ids(2, 5)
    expected = library_greedy(library, prompt, COUNT)
    stop = int(expected[0, 3])
    got = model.generate(prompt, max_new_tokens=COUNT, do_sample=False, eos_token_id=stop)[0, 5:]
    end = expected[0].tolist().index(stop) + 1
    assert got[:end].tolist() == expected[0, :end].tolist()
    assert (got[end:] == PAD).all()


# ---- what is refused


def test_caches_of_other_models_are_refused() -> None:
    _, model = both("mag")
    message = "past_key_values must be a TitansCache, got DynamicCache"
    with pytest.raises(TypeError, match=message):
        model(ids(1, 3), past_key_values=DynamicCache())
    with pytest.raises(TypeError, match=message):
        model.generate(ids(1, 3), past_key_values=DynamicCache(), max_new_tokens=2)


def test_continuous_batching_is_refused() -> None:
    _, model = both("mag")
    with pytest.raises(NotImplementedError, match="needs a cache of keys and values"):
        model.generate_batch([[1, 2, 3]])


def test_kinds_of_caches_are_warned_about() -> None:
    library, model = both("mag")
    prompt = ids(1, 4)
    with pytest.warns(UserWarning, match="cache_implementation='static' has no effect"):
        got = continued(model, prompt, cache_implementation="static")
    assert torch.equal(got, library_greedy(library, prompt, COUNT))


def test_what_cannot_be_taken_back_is_refused() -> None:
    _, model = both("mag")
    cache = TitansCache(max_past_calls=2)
    model(ids(1, 5), past_key_values=cache)
    with pytest.raises(RuntimeError, match="recorded, after activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="at most, got -6"):
        cache.crop(-6)
    with pytest.raises(ValueError, match="negative number"):
        cache.crop(3)
    cache.activate_past_recording()
    for seed in range(3):
        model(ids(1, 1, seed=seed), past_key_values=cache)
    with pytest.raises(RuntimeError, match="the last 2"):
        cache.crop(-3)


def test_a_cache_of_another_batch_is_refused() -> None:
    _, model = both("mag")
    cache = model(ids(2, 3)).past_key_values
    with pytest.raises(ValueError, match="of the input's batch size 3, got 2"):
        model(ids(3, 1), past_key_values=cache)


@pytest.mark.slow
def test_pipelines_run() -> None:
    from titans_pytorch.hf import byte_tokenizer, from_library
    from titans_pytorch.titans import TitansConfig, TitansMAG

    tokenizer = byte_tokenizer()
    model = from_library(TitansMAG(len(tokenizer), TitansConfig(16, 1, window=8)), pad_token_id=0).eval()
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    answers = generate(["Once upon", "A"], max_new_tokens=4, do_sample=False)
    alone = [generate(text, max_new_tokens=4, do_sample=False) for text in ("Once upon", "A")]
    assert answers == alone
