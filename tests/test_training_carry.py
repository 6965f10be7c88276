"""--carry: a state goes over segments of one document, and a resumed run is the uninterrupted one all the same."""

from __future__ import annotations

import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from tests import killed
from tests.test_training_processes import CLOSE, TORCHRUN, launch, losses
from tests.training_runs import error, logged, text, train, train_attention, weights
from titans_pytorch import MemoryAsContextTransformer
from titans_pytorch.attention_transformer import AttentionTransformer
from titans_pytorch.titans import TitansConfig, TitansMAC, TitansMAG
from titans_pytorch.training import checkpoints, data, loop
from titans_pytorch.training.carrying import Carrying, Stretches, losses_over_segments, segment
from titans_pytorch.training.next_token import NextTokenLoss
from titans_pytorch.training.text import text_of

CARRY = ["--carry", "3", "--steps", "12", "--checkpoint-every", "4", "--validate-every", "6", "--sample-every", "0"]
CONFIG = TitansConfig(dim=16, depth=2, window=8, heads=2, memory_chunk=4, memory_refresh=8)
MODELS = {
    "mag": lambda: TitansMAG(256, CONFIG),
    "mac": lambda: TitansMAC(256, CONFIG),
    "transformer": lambda: MemoryAsContextTransformer(
        num_tokens=256, dim=16, depth=2, segment_len=8, neural_memory_segment_len=4, num_longterm_mem_tokens=2
    ),
    "nested": lambda: AttentionTransformer(num_tokens=256, dim=16, depth=1, attention="nested", heads=2, dim_head=8),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, words: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, words, *CARRY) == 0
    return folder


# ---- which text


def corpus(*lengths: int) -> data.Corpus:
    """Documents of one letter each."""
    documents = [np.full(length, number, dtype=np.uint8) for number, length in enumerate(lengths)]
    starts, ids = data.starts_of(documents), np.concatenate(documents)
    return data.Corpus("letters", ids, ids, train_starts=starts, valid_starts=starts)


def test_segments_of_a_group_go_on_and_stay_in_their_document() -> None:
    ids = np.concatenate([np.arange(100) + 1000 * number for number in range(4)])
    starts = np.array([0, 100, 200, 300])
    documents = data.Corpus("numbers", ids, ids, train_starts=starts)
    for group in range(20):
        which = dict(carry=3, seed=0, index=0, size=4, length=20)
        parts = [segment(documents, step=3 * group + place, **which) for place in range(3)]
        joined = torch.cat([parts[0], *(part[:, 1:] for part in parts[1:])], dim=1)
        assert joined.shape == (4, 61)
        assert (joined.diff(dim=1) == 1).all()  # one document, nothing left out
        for before, after in itertools.pairwise(parts):
            assert torch.equal(before[:, -1], after[:, 0])


def test_every_place_of_every_document_that_is_long_enough_can_be_drawn() -> None:
    stretches = Stretches.of(np.zeros(18), np.array([0, 5, 7, 7]), 4)  # of 5, 2, 0 and 11 tokens
    assert stretches.count == 2 + 8
    assert stretches.begin(np.arange(10)).tolist() == [0, 1, 7, 8, 9, 10, 11, 12, 13, 14]
    assert stretches.evenly(3).tolist() == [0, 9, 14]
    assert Stretches.of(np.zeros(9), None, 4).count == 6


def test_tokens_of_documents_are_in_documents() -> None:
    """Were the tokenizer's boundaries not kept, carried states would go on in another file."""

    class Pairs:
        num_tokens, unit = 65536, "token"

        def encode(self, given: bytes) -> Any:
            return np.frombuffer(given[: len(given) // 2 * 2], dtype=np.uint16)

    found = data.tokenized(corpus(6, 3, 8), Pairs())  # type: ignore[arg-type]
    assert found.train_starts is not None
    assert found.train_starts.tolist() == [0, 3, 4]
    assert len(found.train) == 3 + 1 + 4
    assert data.tokenized(corpus(6, 3), text_of(None)).train_starts is not None


# ---- what is computed


@pytest.mark.parametrize("name", MODELS)
def test_segments_with_a_carried_state_are_the_whole_sequence(name: str) -> None:
    torch.manual_seed(0)
    model: Any = NextTokenLoss(MODELS[name]().double())
    ids = torch.randint(0, 256, (2, 61))
    expected = model(ids, per_token=True)
    assert_close(losses_over_segments(model, ids, 3), expected, rtol=1e-9, atol=1e-9)
    assert_close(losses_over_segments(model, ids, 1), expected, rtol=0, atol=0)
    carrying, found = Carrying(3), []
    for step in range(6):  # two groups
        part = ids[:, step % 3 * 20 : step % 3 * 20 + 21]
        found.append(carrying.loss(model, part, step, 0))
        tensors = tensors_of(carrying.states[0])
        assert not any(tensor.requires_grad for tensor in tensors)
        assert (len(tensors) > 0) == (step % 3 != 2)
    means = [each.mean() for each in expected.split(20, dim=1)]
    assert_close(found, [*means, *means], rtol=1e-9, atol=1e-9)
    assert all(each.requires_grad for each in found)


def tensors_of(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, tuple) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def test_nothing_is_carried_into_another_group_and_each_micro_batch_has_its_own() -> None:
    seen: list[Any] = []

    def model(ids: torch.Tensor, state: Any, carries: bool) -> tuple[torch.Tensor, Any]:
        seen.append(state)
        return ids.sum(), (ids + 0,)

    carrying = Carrying(2)
    for step in range(4):
        for micro in range(2):
            carrying.loss(model, torch.tensor([10 * step + micro]), step, micro)
    assert [None if each is None else int(each[0]) for each in seen] == [None, None, 0, 1, None, None, 20, 21]


@pytest.mark.parametrize("carry, every, due", [(1, 2, [2, 4, 6]), (3, 2, [3, 6]), (3, 4, [6]), (2, 5, [6]), (3, 0, [])])
def test_what_is_due_waits_for_the_end_of_a_group(carry: int, every: int, due: list[int]) -> None:
    assert [step for step in range(1, 7) if Carrying(carry).is_due(step, every)] == due


# ---- runs


def check_equal(folder: Path, whole: Path) -> None:
    assert logged(folder) == logged(whole)
    assert_close(weights(folder), weights(whole), rtol=0, atol=0)


def test_validation_is_over_all_segments(whole: Path) -> None:
    valid = [each for each in logged(whole) if "by_position" in each]
    assert [each["step"] for each in valid] == [6, 12]
    assert [path.name[-2:] for path in checkpoints.paths(whole / "checkpoints")] == ["12", "09"]
    assert len(valid[0]["by_position"]) == 16


def test_a_carried_state_is_seen(whole: Path, words: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "run", words, *CARRY, "--carry", "1") == 0
    assert logged(tmp_path / "run")[1]["loss"] != logged(whole)[1]["loss"]


def test_killed_inside_a_group_and_resumed_is_the_uninterrupted_run(
    whole: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def dies(*_: Any) -> None:
        raise Killed

    step = loop.Trainer.step
    monkeypatch.setattr(loop.Trainer, "step", killed.on_call(9, step, dies))
    with pytest.raises(Killed):
        train(tmp_path / "run", words, *CARRY)
    monkeypatch.setattr(loop.Trainer, "step", step)
    assert train(tmp_path / "run", words, "--resume") == 0
    check_equal(tmp_path / "run", whole)


def test_stopping_waits_for_the_end_of_the_group(
    whole: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: loop.Trainer, *args: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args)

    step = loop.Trainer.step
    monkeypatch.setattr(loop.Trainer, "step", killed.on_call(7, step, interrupted))
    assert train(tmp_path / "run", words, *CARRY) == 130
    assert checkpoints.paths(tmp_path / "run" / "checkpoints")[0].name == "step-00000009"
    assert train(tmp_path / "run", words, "--resume") == 0
    steps = [[each for each in logged(run) if "loss" in each] for run in (tmp_path / "run", whole)]
    assert steps[0] == steps[1]


def test_the_other_script_too(words: Path, tmp_path: Path) -> None:
    common = ["--attention", "nested", "--carry", "2", "--lr-end", "1", "--steps"]
    assert train_attention(tmp_path / "run", words, *common, "4") == 0
    assert train_attention(tmp_path / "run", words, "--resume", "--steps", "6") == 0
    assert train_attention(tmp_path / "whole", words, *common, "6") == 0
    assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--shard"]])
def test_two_processes_are_one_that_accumulates(options: list[str], words: Path, tmp_path: Path) -> None:
    common = ["--carry", "2", "--steps", "2", "--validate-every", "2", "--checkpoint-every", "2", "--lr-end", "1"]
    assert train(tmp_path / "one", words, *common, "--accumulate", "2") == 0
    launch(TORCHRUN, tmp_path / "two", words, *common, *options)
    assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), **CLOSE)
    assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), rtol=1e-3, atol=1e-4)


# ---- mistakes


def test_mistakes_are_one_sentence(
    whole: Path, words: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "a", words, "--carry", "3", "--steps", "10") == 2
    assert "--steps must be a multiple of --carry 3, got 10" in error(capsys)
    assert train(tmp_path / "b", words, "--carry", "0") == 2
    assert "--carry must be at least 1, got 0" in error(capsys)
    assert train(whole, words, "--resume", "--carry", "2") == 2
    assert "--carry must be 3, as the run was started, got 2" in error(capsys)
    assert train(tmp_path / "c", words, "--carry", "100", "--steps", "100") == 2
    assert "--data must have a document of validation text with more than --carry 100 times --sequence 64" in error(
        capsys
    )


def test_a_document_has_to_be_long_enough() -> None:
    documents = corpus(30, 40)
    documents.check(13, "byte", 3)
    with pytest.raises(ValueError, match=r"more than --carry 3 times --sequence 14 bytes, got at most 40 from letters"):
        documents.check(14, "byte", 3)
    replace(documents, train_starts=None, valid_starts=None).check(23, "byte", 3)
