"""A mixer of one's own: one small class and its name, no edit to the library; it streams like those of the paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.support.titans_configurations import DIM, config_of, disturbed, random_inputs
from titans_pytorch import load_state, save_state
from titans_pytorch.titans import TitansBackbone
from titans_pytorch.titans.mixers import MIXERS, Mixer, register_mixer


class ToyState(NamedTuple):
    total: Tensor  # (b 1 dim)  of the tokens so far
    memory: Any


class RunningMean(Mixer):
    """What the memory reads, and the mean of all tokens so far."""

    State = ToyState

    def forward(self, x: Tensor, start: int, state: Any) -> tuple[Tensor, ToyState]:
        before, memory = (torch.zeros_like(x[:, :1]), None) if state is None else state
        totals = before + x.cumsum(dim=1)
        counts = torch.arange(start + 1, start + 1 + x.shape[1], dtype=x.dtype)
        read, memory = self.memory(x, state=memory)
        return read + totals / counts[:, None], ToyState(totals[:, -1:], memory)


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_mixer("toy", RunningMean)
    yield
    del MIXERS["toy"]


def test_it_streams_in_pieces_and_its_states_can_be_saved_and_chosen_from(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = disturbed(TitansBackbone("toy", config_of("plain")).double()), random_inputs(3, 13)
    whole, _ = model(x)
    assert whole.shape == (3, 13, DIM)
    outputs, state = [], None
    for piece in x.split((5, 1, 7), dim=1):
        out, state = model(piece, state)
        outputs.append(out)
    assert_close(torch.cat(outputs, dim=1), whole)

    _, state = model(x[:, :6])
    save_state(state, tmp_path / "state.safetensors")
    assert_close(model(x[:, 6:], load_state(tmp_path / "state.safetensors"))[0], whole[:, 6:])
    assert_close(model(x[[2, 0], 6:], state.select([2, 0]).detach())[0], whole[[2, 0], 6:])


def test_a_name_is_given_once_and_to_a_mixer() -> None:
    with pytest.raises(ValueError, match="name must be a new one, got 'mac', which is MemoryAsContext"):
        register_mixer("mac", RunningMean)
    with pytest.raises(ValueError, match="kind must have a State of a new name, got ToyState, that of RunningMean"):
        register_mixer("toy again", RunningMean)
    with pytest.raises(TypeError, match="kind must be a class of Mixer with a State"):
        register_mixer("other", torch.nn.Linear)  # type: ignore[arg-type]
