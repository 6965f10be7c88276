"""What the library wrote before its folders moved, in tests/written_before, is read as ever: models, states, runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from titans_pytorch import (
    MemoryAsContextTransformer,
    NeuralMemory,
    TitansLMM,
    TitansMAC,
    TitansMAG,
    TitansMAL,
    load_state,
)
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
