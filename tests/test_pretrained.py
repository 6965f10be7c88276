"""Models and states as files: what is loaded does what was saved."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tests.support.mac_configurations import NUM_TOKENS
from titans_pytorch import (
    FactorizedMemoryMLP,
    GatedResidualMemoryMLP,
    MemoryAsContextTransformer,
    MemoryAttention,
    MemoryMLP,
    MemorySwiGluMLP,
    NeuralMemory,
    load_state,
    save_state,
)
from titans_pytorch.pretrained import described

MODELS = [
    None,
    MemoryMLP(8, 2, expansion_factor=1.3),
    GatedResidualMemoryMLP(8, depth=1),
    FactorizedMemoryMLP(dim=8, depth=2, k=3),
    MemorySwiGluMLP(8),
    MemoryAttention(8, scale=4.0),
]
SIZES = dict(num_tokens=NUM_TOKENS, dim=8, depth=2, segment_len=4, dim_head=4, heads=2)
IDS = torch.randint(0, NUM_TOKENS, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: type(model).__name__)
def test_a_memory_comes_back(model: nn.Module | None, tmp_path: Path) -> None:
    memory = NeuralMemory(8, (2, 4), model=model, activation=nn.LeakyReLU(0.3), momentum_order=2).double()
    memory.save_pretrained(tmp_path)
    loaded = NeuralMemory.from_pretrained(tmp_path)
    seq = torch.randn(2, 11, 8, dtype=torch.float64)
    assert_close(loaded(seq)[0], memory(seq)[0], rtol=0, atol=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_transformer_comes_back(tmp_path: Path) -> None:
    model = MemoryAsContextTransformer(
        **SIZES,
        neural_memory_layers=(2,),
        neural_memory_model=MemoryMLP(4, depth=1),
        neural_memory_kwargs=dict(heads=2, dim_head=4, activation=nn.SiLU()),
    )
    model.save_pretrained(tmp_path)
    loaded = MemoryAsContextTransformer.from_pretrained(str(tmp_path))
    assert_close(loaded(IDS), model(IDS), rtol=0, atol=0)
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_modules_of_ones_own_are_passed_once_more(tmp_path: Path) -> None:
    memory = NeuralMemory(8, 2, model=Own())
    memory.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model must be passed to from_pretrained, it was saved with .*Own"):
        NeuralMemory.from_pretrained(tmp_path)
    seq = torch.randn(1, 5, 8)
    assert_close(NeuralMemory.from_pretrained(tmp_path, model=Own())(seq)[0], memory(seq)[0], rtol=0, atol=0)


def test_missing_weights_are_an_error(tmp_path: Path) -> None:
    NeuralMemory(8, 2).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="transition_gate"):
        NeuralMemory.from_pretrained(tmp_path, gated_transition=True, batch_size=2)


def test_only_modules_of_known_packages_are_built(tmp_path: Path) -> None:
    NeuralMemory(8, 2).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    for name in ("os.system", "torch.load"):
        config.write_text(json.dumps(dict(dim=8, chunk_size=2, model={"class": name, "arguments": {}})))
        with pytest.raises(ValueError, match="model must be"):
            NeuralMemory.from_pretrained(tmp_path)


def test_arguments_survive_copies() -> None:
    for copied in (copy.deepcopy(MODELS[1]), pickle.loads(pickle.dumps(MODELS[1]))):
        assert described(copied) == {
            "class": "titans_pytorch.memory_models.MemoryMLP",
            "arguments": dict(dim=8, depth=2, expansion_factor=1.3),
        }


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(),
        dict(momentum=False),
        dict(batch_size=4, gated_transition=True, momentum_order=2),
        dict(model=MemoryAttention(8)),
        dict(qkv_receives_diff_views=True),
    ],
    ids=str,
)
def test_what_was_memorised_can_be_kept(kwargs: dict[str, Any], tmp_path: Path) -> None:
    memory = NeuralMemory(8, (2, 4) if not kwargs else 4, **kwargs)
    views = (3,) if "qkv_receives_diff_views" in kwargs else ()
    seq, more = torch.randn(*views, 2, 11, 8), torch.randn(*views, 2, 6, 8)
    mask = torch.rand(2, 11) > 0.3
    _, state = memory(seq, store_mask=mask)
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    expected, after = memory(more, state=state)
    got, loaded_after = memory(more, state=loaded)
    assert_close(got, expected, rtol=0, atol=0)
    assert_close(loaded_after.updates["norm.gamma"], after.updates["norm.gamma"], rtol=0, atol=0)


def test_a_cache_can_be_kept(tmp_path: Path) -> None:
    model = MemoryAsContextTransformer(**SIZES, neural_memory_layers=(2,), num_longterm_mem_tokens=1)
    _, cache = model(IDS[:, :7], return_cache=True)
    save_state(cache, tmp_path / "cache.safetensors")
    loaded = load_state(tmp_path / "cache.safetensors")
    assert loaded.num_tokens == 7
    assert_close(model(IDS[:, 7:], cache=loaded), model(IDS[:, 7:], cache=cache), rtol=0, atol=0)


def test_refuses_what_is_no_state(tmp_path: Path) -> None:
    NeuralMemory(8, 2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a file of save_state"):
        load_state(tmp_path / "model.safetensors")
    with pytest.raises(TypeError, match="state must be a NeuralMemState, a MACCache or a TitansState"):
        save_state({}, tmp_path / "state.safetensors")
