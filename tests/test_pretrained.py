"""Models and states as files: what is loaded does what was saved."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
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
    NeuralMemState,
    TitansConfig,
    TitansMAC,
    load_state,
    save_state,
)
from titans_pytorch.losses import summed_squared_error
from titans_pytorch.pretrained import described, rebuilt
from titans_pytorch.public_names import class_of, public_name, register_named, register_state, state_kind

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


REFUSED = [
    "os.system",
    "torch.load",
    "nn.Parameter",
    "nn.functional",
    "os.MemoryMLP",
    "json",
    "MemoryMlp",
    "mse",
    "Tails",
]


@pytest.mark.parametrize("name", REFUSED)
def test_only_what_has_a_public_name_is_built(name: str, tmp_path: Path) -> None:
    NeuralMemory(8, 2).save_pretrained(tmp_path)
    config = dict(dim=8, chunk_size=2, model={"class": name, "arguments": {}})
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"^model must be a module of torch.nn or one of .*MemoryMLP.*, got '{name}'"):
        NeuralMemory.from_pretrained(tmp_path)


def test_files_speak_public_names(tmp_path: Path) -> None:
    """Neither configs nor states name modules, so that files outlive the folders of the library."""
    memory = NeuralMemory(8, 4, model=MemoryMLP(8, 1), activation=nn.SiLU(), store_memory_loss_fn=summed_squared_error)
    memory.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"] == {"class": "MemoryMLP", "arguments": {"dim": 8, "depth": 1}}
    assert config["activation"] == {"class": "nn.SiLU", "arguments": {}}
    assert config["store_memory_loss_fn"] == {"named": "sse"}
    loaded, seq = NeuralMemory.from_pretrained(tmp_path), torch.randn(1, 9, 8)
    assert_close(loaded(seq)[0], memory(seq)[0], rtol=0, atol=0)
    titans = TitansConfig(dim=8, depth=1, heads=1, window=4)
    assert described(titans)["class"] == "TitansConfig"
    assert rebuilt("config", described(titans)) == titans
    save_state(memory(seq)[1], tmp_path / "state.safetensors")
    assert "titans_pytorch." not in (tmp_path / "state.safetensors").read_bytes().decode("latin1").replace(
        "titans_pytorch.state", ""
    )


@pytest.mark.parametrize(
    "old, kind",
    [
        ("titans_pytorch.titans.config.TitansConfig", TitansConfig),
        ("titans_pytorch.fast.memory_models.MemoryMLP", MemoryMLP),
        ("titans_pytorch.titans_mac.TitansMAC", TitansMAC),
        ("torch.nn.modules.activation.SiLU", nn.SiLU),
    ],
)
def test_paths_in_older_files_are_known_by_their_last_part(old: str, kind: type) -> None:
    assert class_of(old) is kind
    assert class_of(public_name(kind)) is kind


def test_things_of_ones_own_are_known_by_the_names_they_are_given(tmp_path: Path) -> None:
    loss = register_named("of this test", absolute_error)
    memory, seq = NeuralMemory(8, 2, store_memory_loss_fn=loss), torch.randn(1, 9, 8)
    memory.save_pretrained(tmp_path)
    assert_close(NeuralMemory.from_pretrained(tmp_path)(seq)[0], memory(seq)[0], rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"a public name must be new, got 'of this test', which is .*absolute_error"):
        register_named("of this test", summed_squared_error)
    with pytest.raises(ValueError, match=r"what a file names must be known by register_named, got .*Own"):
        public_name(Own)
    with pytest.raises(ValueError, match=r"store_memory_loss_fn must be one of .*mse.*, got 'rmse'"):
        rebuilt("store_memory_loss_fn", {"named": "rmse"})


def absolute_error(prediction: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return (prediction - value).abs().mean(dim=-1)


def test_kinds_of_states_are_known_by_their_own_names(tmp_path: Path) -> None:
    assert {state_kind(name) for name in ("NeuralMemState", "MACState", "LayerState")} >= {NeuralMemState}
    with pytest.raises(ValueError, match=r"a kind of state must be one of .*KeyValueCache, .*, got 'MemoryMLP'"):
        state_kind("MemoryMLP")
    with pytest.raises(TypeError, match="a kind of state must be a NamedTuple, got <class 'dict'>"):
        register_state(dict)
    file = {"a": torch.zeros(1)}
    about = {"format": "titans_pytorch.state", "version": "2"}
    save_file(file, tmp_path / "state", metadata=about | {"layout": '{"kind": "Popen", "fields": {}}'})
    with pytest.raises(ValueError, match=r"a kind of state must be one of .*, got 'Popen'"):
        load_state(tmp_path / "state")
    save_file(file, tmp_path / "state", metadata=about | {"layout": '{"tensor": "a"}'})
    with pytest.raises(ValueError, match=r"must hold a NeuralMemState, .* or a RaggedState, got Tensor"):
        load_state(tmp_path / "state")
    save_file(file, tmp_path / "state", metadata=about | {"version": "3", "layout": "{}"})
    with pytest.raises(ValueError, match="must be of version 2 or older, got 3: update the library"):
        load_state(tmp_path / "state")


def test_arguments_survive_copies() -> None:
    for copied in (copy.deepcopy(MODELS[1]), pickle.loads(pickle.dumps(MODELS[1]))):
        assert described(copied) == {
            "class": "MemoryMLP",
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
    with pytest.raises(TypeError, match="state must be a NeuralMemState, a TNTState, a MACCache, a TitansState or a"):
        save_state({}, tmp_path / "state.safetensors")
