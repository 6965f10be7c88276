"""What the library wrote before its folders moved, in tests/written_before, is read as ever: models, states, runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

import train_mac
import train_titans
from tests.training_runs import text
from titans_pytorch import (
    MemoryAsContextTransformer,
    NeuralMemory,
    TitansLMM,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    load_state,
)
from titans_pytorch.training import runs_command, start
from titans_pytorch.training.checkpoints import last
from titans_pytorch.training.models import MACModel, PaperModel
from titans_pytorch.training.runs import Run

FOLDER = Path(__file__).parent / "written_before"
ANSWERS = load_file(FOLDER / "answers.safetensors")
VALUES = dict(rtol=1e-4, atol=1e-5)  # float32, on another machine than theirs


def check(name: str, whole: Tensor, more: Tensor) -> None:
    assert_close(whole, ANSWERS[f"{name}.0"], **VALUES)
    assert_close(more, ANSWERS[f"{name}.1"], **VALUES)


@torch.no_grad()
def test_a_memory_and_its_state() -> None:
    memory = NeuralMemory.from_pretrained(FOLDER / "neural_memory")
    state = load_state(FOLDER / "neural_memory.safetensors")
    check("neural_memory", memory(ANSWERS["seq"])[0], memory(ANSWERS["next_seq"], state=state)[0])


@torch.no_grad()
def test_a_transformer_and_its_cache() -> None:
    model = MemoryAsContextTransformer.from_pretrained(FOLDER / "mac_transformer")
    cache = load_state(FOLDER / "mac_transformer.safetensors")
    check("mac_transformer", model(ANSWERS["ids"]), model(ANSWERS["more"], cache=cache))


@torch.no_grad()
@pytest.mark.parametrize("kind", [TitansMAC, TitansMAG, TitansMAL, TitansLMM])
def test_models_of_the_paper_and_their_states(kind: Any) -> None:
    name = f"titans_{kind.variant}"
    model, state = kind.from_pretrained(FOLDER / name), load_state(FOLDER / f"{name}.safetensors")
    check(name, model(ANSWERS["ids"])[0], model(ANSWERS["more"], state)[0])


@pytest.mark.parametrize(
    "name, kind", [("run_titans", TitansMAG), ("run_mac", MemoryAsContextTransformer)], ids=["titans", "mac"]
)
def test_a_run(name: str, kind: type) -> None:
    model, checkpoint = Run(FOLDER / name).model("last")
    assert isinstance(model, kind)
    assert checkpoint.progress.step == 4


@pytest.mark.parametrize(
    "name, script, presets, kind",
    [("run_titans", "titans", train_titans.PRESETS, PaperModel), ("run_mac", "mac", train_mac.PRESETS, MACModel)],
    ids=["titans", "mac"],
)
def test_a_run_samples_and_goes_on(name: str, script: str, presets: Any, kind: Any, tmp_path: Path) -> None:
    run = shutil.copytree(FOLDER / name, tmp_path / "run")
    assert runs_command.main(["sample", str(run), "--prompt", "memory", "--length", "4"]) == 0

    where = ["--data", str(text(tmp_path / "text.txt")), "--data-dir", str(tmp_path / "data"), "--folder", str(run)]
    AcceleratorState._reset_state(reset_partial_state=True)
    more = ["--resume", "--steps", "6", "--device", "cpu", "--no-pictures"]
    assert start(script, kind, presets, [*where, *more]) == 0
    found = last(run / "checkpoints")
    assert found is not None
    assert found.progress.step == 6
    model = Run(run).model("last")[0]
    assert json.loads((run / "config.json").read_text())["model_class"] == type(model).__name__
