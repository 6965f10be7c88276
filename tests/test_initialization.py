"""Modules that were made without storage begin as any other; casts spoil no angle."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.support.sequence_modules import NUM_TOKENS, READERS, config
from tests.support.streams import randn
from titans_pytorch import (
    ImplicitMLPAttention,
    MemoryMLP,
    NeuralMemory,
    TitansMAG,
    reset_parameters,
)
from titans_pytorch.attention.rotary import RotaryEmbedding

CHECKOUT = Path(__file__).parent.parent


def without_storage(build: Callable[[], nn.Module]) -> nn.Module:
    """Made on the meta device, and then given storage that nobody has set."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        module = build()
    module.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.fill_(torch.nan)
        for each in module.modules():
            for p in each.memory_model.parameters() if isinstance(each, NeuralMemory) else ():
                p.fill_(torch.nan)
    return module


def assert_same(got: nn.Module, expected: nn.Module) -> None:
    assert_close(dict(got.named_parameters()), dict(expected.named_parameters()), rtol=0, atol=0)


def assert_alike(key: str, got: Tensor, wanted: Tensor) -> None:
    """Drawn anew where it is drawn, the same where it is a constant."""
    assert got.isfinite().all(), key
    if wanted.ndim == 0 or (wanted.numel() > 1 and bool((wanted == wanted.flatten()[0]).all())):
        assert torch.equal(got, wanted), key
    elif wanted.numel() > 15:
        assert 0.4 < got.std() / wanted.std() < 2.5, key


@pytest.mark.parametrize("name", READERS)
def test_what_is_set_once_more_is_what_the_constructor_sets(name: str) -> None:
    reader = READERS[name]
    module = without_storage(reader.build)
    torch.manual_seed(3)
    reset_parameters(module)
    expected = reader.made(3)
    assert_same(module, expected)
    given = reader.given(2, 9)
    assert torch.equal(reader.outputs(module, given), reader.outputs(expected, given))


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("order", ["parents first", "children first"])
def test_a_loop_over_modules_sets_everything_in_any_order(name: str, order: str) -> None:
    """As tools do that know nothing of `reset_parameters(model)`: parents first draws the same numbers."""
    module, expected = without_storage(READERS[name].build), READERS[name].made(3)
    torch.manual_seed(3)

    def begin(each: nn.Module) -> None:
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()

    if order == "children first":
        module.apply(begin)
    else:
        for each in module.modules():
            begin(each)
    if order == "parents first":
        assert_same(module, expected)
    for (key, got), wanted in zip(module.named_parameters(), expected.parameters(), strict=True):
        assert_alike(key, got, wanted)
    for memory, ordinary in zip(module.modules(), expected.modules(), strict=True):
        if isinstance(memory, NeuralMemory) and begins_as_association(ordinary):
            assert begins_as_association(memory)
            assert memory.to_keys.convolution.weight.argmax(0).eq(1).all()


def begins_as_association(memory: Any) -> bool:
    """Whether queries start as keys, behind convolutions."""
    if type(memory.to_keys).__name__ != "ConvolvedLinear":
        return False
    return torch.equal(memory.to_queries.linear.weight, memory.to_keys.linear.weight)


def test_memories_of_the_paper_begin_as_associations() -> None:
    memories = [each for name in READERS for each in READERS[name].made(3).modules() if isinstance(each, NeuralMemory)]
    assert sum(map(begins_as_association, memories)) >= 4


def test_a_memory_that_was_reset_learns() -> None:
    for name, options in {"plain": {}, "the paper's": None}.items():
        build = (lambda: NeuralMemory.paper(8, heads=2)) if options is None else (lambda: NeuralMemory(8, 4))
        memory = without_storage(build)
        reset_parameters(memory)
        _, state = memory(randn(1, 32, 8, dtype=torch.float32))
        moved = [(state.current[key] - memory.init_weights(1)[key]).abs().max() for key in state.current]
        assert max(moved) > 1e-4, name


def test_a_memory_model_begins_as_it_was_given() -> None:
    given = MemoryMLP(8, depth=2)
    memory = NeuralMemory(8, 4, model=given)
    with torch.no_grad():
        for p in (*memory.parameters(), *memory.memory_model.parameters()):
            p.fill_(torch.nan)
    reset_parameters(memory)
    for own, p in zip(memory.memory_model_parameters[1:], given.parameters(), strict=True):
        assert torch.equal(own[0], p)


class Bare(nn.Module):
    """A memory model of somebody's, which does not say how it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Started(Bare):
    """One that does."""

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)


def test_modules_of_others_say_how_they_begin_or_are_refused() -> None:
    memory = without_storage(lambda: NeuralMemory(8, 4, model=Started()))
    reset_parameters(memory)
    weight = memory.memory_model_parameters[1][0]
    assert_close(weight @ weight.mT, torch.eye(8))
    with pytest.raises(ValueError, match=r"must have reset_parameters\(\), got Bare without, which owns model.weight"):
        reset_parameters(without_storage(lambda: NeuralMemory(8, 4, model=Bare())))
    with pytest.raises(ValueError, match=r"must have reset_parameters\(\), got Bare without, which owns 0.weight"):
        reset_parameters(nn.Sequential(Bare(), nn.Linear(3, 3)))
    with torch.device("meta"), pytest.raises(ValueError, match="got weight on the meta device: call to_empty"):
        reset_parameters(nn.Linear(3, 3))
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got int"):
        reset_parameters(3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["TitansMAG, plain", "MemoryAsContextTransformer, everything"])
def test_only_some_are_set_and_all_others_stay(name: str) -> None:
    """What a checkpoint has is kept, whichever part of it is missing."""
    expected, names = READERS[name].made(3), list(dict(READERS[name].made().named_parameters()))
    for first in range(5):
        module = READERS[name].made(7)
        loaded = {key: p.detach().clone() for key, p in module.named_parameters()}
        missing = set(names[first::5])
        torch.manual_seed(3)
        reset_parameters(module, only=[p for key, p in module.named_parameters() if key in missing])
        for key, p in module.named_parameters():
            followed = key.replace("to_queries", "to_keys")
            if key in missing and (followed == key or followed in missing):
                assert torch.equal(p, expected.get_parameter(key)), key
            elif key not in missing:
                assert torch.equal(p, loaded[key]), key


def test_numbers_of_a_seed_do_not_depend_on_how_gates_begin() -> None:
    torch.manual_seed(0)
    plain = NeuralMemory(8, 4)
    torch.manual_seed(0)
    biased = NeuralMemory(8, 4, init_decay_bias=-3.0, init_momentum_bias=1.0)
    assert torch.equal(plain.to_values.weight, biased.to_values.weight)
    assert biased.to_decay_factor[0].bias.eq(-3.0).all()


# ---- a memory that can never learn


@pytest.mark.parametrize(
    "build",
    [
        lambda: NeuralMemory(8, 4),
        lambda: NeuralMemory(8, 4, heads=2, dim_head=4, default_model_kwargs=dict(depth=3)),
        lambda: NeuralMemory.paper(8, heads=2),
        lambda: TitansMAG(NUM_TOKENS, config()),
    ],
)
@pytest.mark.parametrize("how", ["set", "loaded"])
def test_a_memory_of_zeros_is_refused(build: Callable[[], nn.Module], how: str) -> None:
    module = build()
    given = torch.tensor([[1, 2, 3]]) if isinstance(module, TitansMAG) else randn(1, 9, 8, dtype=torch.float32)
    zeros = {k: torch.zeros_like(v) if "memory_model_p" in k else v for k, v in module.state_dict().items()}
    if how == "set":
        module.to_empty(device="cpu")  # as HF's, torchtune's and others' loaders do
        with torch.no_grad():
            for key, p in module.named_parameters():
                p.copy_(zeros[key])
    else:
        module(given)
        module.load_state_dict(zeros)
    with pytest.raises(ValueError, match=r"memory_model_parameters must not all be zero, .*reset_parameters\(module\)"):
        module(given)
    reset_parameters(module)
    module(given)


def test_zeros_from_which_a_memory_learns_are_fine() -> None:
    memory = NeuralMemory(8, 4, default_model_kwargs=dict(depth=1), mem_model_norm_add_residual=False)
    nn.init.zeros_(memory.memory_model_parameters[0])
    _, state = memory(randn(1, 9, 8, dtype=torch.float32))
    assert state.current["weights.0"].any()


# ---- angles


@pytest.mark.parametrize("cast", [nn.Module.bfloat16, nn.Module.half, nn.Module.double, nn.Module.float])
def test_angles_are_those_of_float64_after_any_cast(cast: Callable[[nn.Module], nn.Module]) -> None:
    """At position 1,000,000, too, where a frequency that was rounded to bfloat16 is thousands of radians off."""
    module = nn.Sequential(RotaryEmbedding(8), nn.Linear(2, 2))
    cast(module)
    like = module[1].weight
    cos, sin = module[0].turns(1_000_000, 3, like)
    angles = torch.arange(1_000_000, 1_000_003).double()[:, None] * 10_000.0 ** -(torch.arange(4).double() / 4)
    assert cos.dtype == torch.float64 if like.dtype == torch.float64 else torch.float32
    assert_close(cos[:, ::2].double(), angles.cos(), rtol=0, atol=1e-6)
    assert_close(sin[:, 1::2].double(), angles.sin(), rtol=0, atol=1e-6)


def older(module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """A checkpoint as older versions wrote it, frequencies included."""
    found = {key: value.to(dtype) for key, value in module.state_dict().items()}
    for name, each in module.named_modules():
        if isinstance(each, RotaryEmbedding):
            pairs = each.dim // 2
            found[f"{name}.freqs"] = (each.theta ** -(torch.arange(pairs) * 2 / each.dim)).to(dtype)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["TitansMAC, plain", "MemoryAsContextTransformer, plain", "ImplicitMLPAttention"])
def test_older_checkpoints_load_whatever_their_precision(name: str, dtype: torch.dtype) -> None:
    one, other = READERS[name].made(), READERS[name].made(1)
    other.load_state_dict(older(one, dtype))
    given = READERS[name].given(1, 9)
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(READERS[name].outputs(other, given), READERS[name].outputs(one, given))
    assert not any("freqs" in key for key in other.state_dict())


def test_frequencies_of_another_kind_are_refused() -> None:
    module = ImplicitMLPAttention(8, (4, 6, 4), heads=2)
    wrong = module.state_dict() | {"rotary_embed.freqs": torch.tensor([1.0, 0.5])}
    with pytest.raises(RuntimeError, match=r"freqs must be the 2 frequencies of theta 10000, got \[1.0, 0.5"):
        module.load_state_dict(wrong)


def test_a_model_in_half_precision_is_one_in_float32_rounded() -> None:
    """Far from the start, where it used to attend to turned keys."""
    torch.manual_seed(0)
    rotary, x = RotaryEmbedding(16), randn(1, 1, 4, 16)
    exact = rotary(x, 100_000)
    assert_close(rotary.bfloat16()(x.bfloat16(), 100_000).double(), exact, rtol=0.02, atol=0.02)


# ---- shards


def sharded_worker(rank: int, store: str, results: str, name: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    reader = READERS[name]
    with torch.device("meta"):
        model = reader.build()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    reset_parameters(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    wholes = {key: p.full_tensor() for key, p in model.named_parameters() if p.numel()}
    with torch.no_grad():
        said = reader.outputs(model, reader.given(1, 9))
    model.reshard()
    torch.manual_seed(4 + rank)
    for each in model.modules():  # shard by shard, as tools do; every process draws for itself
        if hasattr(each, "reset_parameters"):
            each.reset_parameters()
    looped = {key: p.full_tensor() for key, p in model.named_parameters() if p.numel()}
    if rank == 0:
        torch.save((wholes, said, looped), results)
    torch.distributed.barrier()  # nobody leaves while somebody is still being answered
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["TitansMAG, plain", "MemoryAsContextTransformer, one stream, one memory"])
def test_shards_of_two_processes_begin_as_one_model(name: str, tmp_path: Path) -> None:
    results = tmp_path / "results.pt"
    call = "import sys; from tests.test_initialization import sharded_worker as w; w(int(sys.argv[1]), *sys.argv[2:])"
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", call, str(rank), str(tmp_path / "store"), str(results), name],
            env=environment,
            cwd=CHECKOUT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [worker.communicate(timeout=120)[1][-1500:] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
    wholes, said, looped = torch.load(results)
    expected = READERS[name].made(3)
    wanted = {key: p for key, p in expected.named_parameters() if p.numel()}
    assert_close(wholes, wanted, rtol=0, atol=0)
    assert_close(said, READERS[name].outputs(expected, READERS[name].given(1, 9)))
    for key, value in looped.items():
        assert_alike(key, value, expected.get_parameter(key))
    for key in looped:
        if key.endswith("to_keys.convolution.weight"):
            assert looped[key].argmax(0).eq(1).all(), "the lag of keys is lost"
