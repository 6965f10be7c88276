"""A run ends with what writing at test time is worth to its model, and shows on which bytes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import train_mac
from tests.training_runs import logged, text, train
from titans_pytorch import writes_off
from titans_pytorch.causal_lm import next_token_loss
from titans_pytorch.training import surprise, worth
from titans_pytorch.training.data import evenly, rows
from titans_pytorch.training.models import MACModel
from titans_pytorch.training.plan import merged
from titans_pytorch.training.runs import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text(tmp_path_factory.mktemp("text") / "words.txt")


def test_a_run_ends_with_what_writing_is_worth(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last validation is done twice, the second time with writes off: the same sequences, the same model."""
    run = tmp_path / "run"
    assert train(run, data) == 0
    capsys.readouterr()
    assert train(run, data, "--resume") == 0  # it has ended already, and only says once more how
    (sentence,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("held-out text: "))
    *_, record = logged(run)
    model, checkpoint = Run(run).model("last")
    assert checkpoint.progress.step == record["step"]
    text = np.frombuffer(data.read_bytes(), dtype=np.uint8)
    valid = text[int(len(text) * 0.90) : int(len(text) * 0.95)]
    ids = rows(valid, evenly(valid, 4, 65), 65)
    with torch.no_grad():
        on = next_token_loss(model(ids[:, :-1]), ids, per_token=True).mean(dim=0) / math.log(2)
        with writes_off(model):
            off = next_token_loss(model(ids[:, :-1]), ids, per_token=True).mean(dim=0) / math.log(2)
    assert record["valid_bits_per_byte"] == pytest.approx(float(on.mean()), abs=1e-4)
    assert record["valid_bits_per_byte_writes_off"] == pytest.approx(float(off.mean()), abs=1e-4)
    assert float((on - off).abs().mean()) > 1e-3, "the two must be told apart"
    late = float((off - on)[48:].mean())
    assert f"{float(on.mean()):.3f} bits per byte with what memories write, {float(off.mean()):.3f}" in sentence
    assert float(sentence.rsplit(maxsplit=1)[1]) == pytest.approx(late, abs=1e-3)


def test_a_model_without_memory_says_nothing_of_writing(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", data, "--memory", "off", "--steps", "2", "--pictures") == 0
    assert "held-out text" not in capsys.readouterr().out
    assert not any("writes_off" in name for record in logged(tmp_path / "run") for name in record)
    assert not (tmp_path / "run" / "saved.png").exists()


def test_the_sentence_says_what_the_last_validation_found() -> None:
    first = {worth.ON: 9.0, worth.OFF: 9.0, worth.ON_BY_POSITION: [9.0] * 4, worth.OFF_BY_POSITION: [9.0] * 4}
    last = {worth.ON: 2.0, worth.ON_BY_POSITION: [2.0, 2.0, 2.0, 2.0]}
    off = {worth.OFF: 2.5, worth.OFF_BY_POSITION: [2.0, 2.0, 2.0, 4.0]}
    assert worth.worth([first, {"loss": 1.0}]) is not None
    assert worth.worth([first, last]) is None, "the last validation was done with writes alone"
    assert worth.worth([]) is None
    assert worth.worth([first, last | off]) == (
        "held-out text: 2.000 bits per byte with what memories write, 2.500 with writes off: "
        "+0.500, in the last quarter of a sequence +2.000"
    )


def test_what_writing_saves_on_each_byte() -> None:
    """Bits without writes minus bits with them; in front of what was first stored nothing is saved."""
    torch.manual_seed(0)
    model = replace(merged(MACModel(), train_mac.PRESETS["debug"]), memory_max_lr=1.0).build()
    content = np.frombuffer(b"memory learns at test time.\n" * 4, dtype=np.uint8)
    found, ids = surprise.text_surprise(model, content), torch.tensor([content.tolist()])
    assert found.saved is not None
    with torch.no_grad():
        with writes_off(model):
            off = model(ids, return_loss=True)
        on = model(ids, return_loss=True)
    assert float((off - on).abs()) > 1e-4
    assert float(found.saved[1:].mean()) == pytest.approx(float(off - on) / math.log(2), abs=1e-5)
    assert found.saved[0].isnan()
    assert_close(found.saved[1:3], torch.zeros(2), atol=1e-4, rtol=0)
