"""Text is bytes or a tokenizer's tokens: it comes back as it was, is trained on, sampled from, resumed and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.training_runs import error, text, train
from titans_pytorch.training import runs_command
from titans_pytorch.training.runs import Run
from titans_pytorch.training.text import ByteText, TokenizedText

STORY = "Memory learns at test time — déjà vu.\nAnd forgets.\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of some 300 tokens, trained in place."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    words = text(folder / "words.txt").read_text()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [words], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_bytes_come_back_as_they_were() -> None:
    kind = ByteText()
    ids = kind.encode(STORY.encode())
    assert (kind.num_tokens, kind.unit, len(ids)) == (256, "byte", len(STORY.encode()))
    decode = kind.decoder()
    assert "".join(decode(token) for token in ids.tolist()) == STORY
    assert kind.readable(ids) == STORY
    assert b"".join(kind.pieces(ids)) == STORY.encode()


def test_tokens_come_back_as_they_were(tokenizer: Path) -> None:
    kind = TokenizedText(tokenizer)
    ids = kind.encode(STORY.encode())
    assert kind.num_tokens == Tokenizer.from_file(str(tokenizer)).get_vocab_size() > 256
    assert ids.dtype == np.uint16
    assert 0 < len(ids) < len(STORY.encode()), "words that were learned are one token"
    decode = kind.decoder()
    assert "".join(decode(token) for token in ids.tolist()) == STORY
    assert kind.readable(ids) == STORY
    assert b"".join(kind.pieces(ids)) == STORY.encode()


def rewritten(tokenizer: Path, path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The tokenizer's file with something in it changed."""
    content = json.loads(tokenizer.read_text())
    change(content)
    path.write_text(json.dumps(content))
    return path


PADDING = dict(strategy={"Fixed": 64}, direction="Right", pad_to_multiple_of=None, pad_id=0, pad_type_id=0)


@pytest.mark.parametrize(
    "part",
    [
        dict(padding=PADDING | dict(pad_token="!")),
        dict(truncation=dict(direction="Right", max_length=4, strategy="LongestFirst", stride=0)),
    ],
    ids=["padding", "truncation"],
)
def test_what_a_file_says_of_batches_leaves_the_text_whole(
    part: dict[str, Any], tokenizer: Path, tmp_path: Path
) -> None:
    """Many published files pad and cut sentences: a text to train on would be full of padding, or mostly gone."""
    path = rewritten(tokenizer, tmp_path / "tokenizer.json", lambda content: content.update(part))
    ids, plain = TokenizedText(path).encode(STORY.encode()), TokenizedText(tokenizer).encode(STORY.encode())
    assert ids.tolist() == plain.tolist()


def test_ids_with_gaps_have_a_place_in_the_vocabulary(tokenizer: Path, tmp_path: Path) -> None:
    last = TokenizedText(tokenizer).encode(b"Memory").tolist()[-1]

    def move(content: dict[str, Any]) -> None:
        vocabulary = content["model"]["vocab"]
        (name,) = (name for name, token in vocabulary.items() if token == last)
        vocabulary[name] = 70_000

    kind = TokenizedText(rewritten(tokenizer, tmp_path / "tokenizer.json", move))
    assert kind.num_tokens == 70_001
    assert int(kind.encode(b"Memory").max()) == 70_000


def test_a_run_on_tokens(tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bits are reported by the token and by the byte; the run keeps the tokenizer, and goes on without the file."""
    data, run = text(tmp_path / "text.txt"), tmp_path / "run"
    moved = tmp_path / "moved.json"
    moved.write_bytes(tokenizer.read_bytes())
    assert train(run, data, "--tokenizer", str(moved), "--steps", "4") == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    step = next(each for each in records if "bits_per_token" in each)
    ratio = step["bits_per_token"] / step["bits_per_byte"]
    said = float(capsys.readouterr().out.split(" bytes a token")[0].rsplit(" ", 1)[1])
    assert ratio > 1.5
    valid = next(each for each in records if "valid_bits_per_byte" in each)
    assert valid["valid_bits_per_token"] > 1.5 * valid["valid_bits_per_byte"]
    assert ratio == pytest.approx(said, rel=0.01)
    assert Run(run).model()[0].num_tokens == TokenizedText(tokenizer).num_tokens

    moved.unlink()
    assert train(run, data, "--resume", "--steps", "6") == 0
    assert runs_command.main(["sample", str(run), "--prompt", "memory learns", "--length", "8"]) == 0
    assert capsys.readouterr().out.strip()
    assert runs_command.main(["plot", str(run)]) == 0


def test_a_run_without_its_tokenizer_is_not_taken_for_one_of_bytes(
    tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, run = text(tmp_path / "text.txt"), tmp_path / "run"
    assert train(run, data, "--tokenizer", str(tokenizer), "--steps", "1") == 0
    (run / "tokenizer.json").unlink()
    capsys.readouterr()
    assert train(run, data, "--resume", "--steps", "2") == 2
    assert "must hold the tokenizer.json that the run was started with" in error(capsys)
    assert runs_command.main(["sample", str(run), "--prompt", "memory"]) == 2
    assert "must hold the tokenizer.json" in error(capsys)


def test_a_run_that_can_be_resumed_has_its_tokenizer(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed while the settings are written has written the tokenizer before."""

    def killed(self: Run, config: object) -> None:
        assert (self.folder / "tokenizer.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save_config", killed)
    assert train(tmp_path / "run", text(tmp_path / "text.txt"), "--tokenizer", str(tokenizer)) == 130


@pytest.mark.parametrize(
    "content, words", [(None, "which is not there"), ("{}", "must be a file of the package tokenizers")]
)
def test_what_is_no_tokenizer_is_refused(
    content: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    assert train(tmp_path / "run", text(tmp_path / "text.txt"), "--tokenizer", str(path)) == 2
    assert words in error(capsys)
