"""NeuralMemory among torch's tools: copies, checkpoints, optimizers, compilers, threads, processes, precisions."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.support.streams import randn
from titans_pytorch import MemoryAttention, NeuralMemory

EXACT = dict(rtol=1e-9, atol=1e-10)

EVERYTHING: dict[str, Any] = dict(
    dim=6,
    dim_head=4,
    heads=2,
    chunk_size=4,
    batch_size=8,
    num_kv_per_token=2,
    momentum_order=2,
    learned_momentum_combine=True,
    learned_combine_include_zeroth=True,
    per_parameter_lr_modulation=True,
    attn_pool_chunks=True,
    post_rmsnorm=True,
    qk_rmsnorm=True,
    gated_transition=True,
    max_grad_norm=1.0,
    default_step_transform_max_lr=0.2,
)
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "plain": dict(dim=6, chunk_size=4),
    "heads": dict(dim=6, dim_head=4, heads=2, chunk_size=4, batch_size=8, default_step_transform_max_lr=0.2),
    "everything": EVERYTHING,
    "spectral": dict(dim=6, chunk_size=4, spectral_norm_surprises=True, default_step_transform_max_lr=0.2),
    "attention": dict(dim=6, chunk_size=4, model=MemoryAttention(6)),
    "general": dict(dim=6, chunk_size=4, engine="general"),
}


def memory(name: str = "heads", seed: int = 0, **options: Any) -> NeuralMemory:
    torch.manual_seed(seed)
    built = NeuralMemory(**CONFIGURATIONS[name] | options)
    if built.transition_gate is not None:
        nn.init.zeros_(built.transition_gate)
    return built


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return randn(*(shape or (2, 19, 6)), seed=seed, dtype=torch.float32)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_built_without_storage_and_loaded(name: str) -> None:
    """On the meta device, as large models are."""
    expected, x = memory(name), tokens(2, 20, 6)
    with torch.device("meta"):
        built = NeuralMemory(**CONFIGURATIONS[name])
    built.load_state_dict(expected.state_dict(), assign=True)
    assert_close(built(x)[0], expected(x)[0], rtol=0, atol=0)


def loss_of(built: nn.Module, seq: Tensor) -> Tensor:
    return built(seq)[0].square().mean()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_activation_checkpointing_of_either_kind_changes_no_gradient(name: str, use_reentrant: bool) -> None:
    """transformers and torchtune checkpoint whole blocks; the non-reentrant kind refuses to unpack a tensor twice."""
    built, seq = memory(name), tokens().requires_grad_()
    wanted = [seq, *built.parameters()]
    expected = torch.autograd.grad(loss_of(built, seq), wanted, allow_unused=True)
    again = checkpoint(loss_of, built, seq, use_reentrant=use_reentrant)
    again.backward()
    for parameter, gradient in zip(wanted, expected, strict=True):
        assert_close(parameter.grad, gradient, rtol=0, atol=0)


# copies and checkpoints


def through_pickle(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def through_file(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle, through_file])
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_copy_answers_alike_and_is_independent(name: str, how: Callable[[nn.Module], nn.Module]) -> None:
    built, seq = memory(name), tokens()
    before = built(seq)[0]
    loss_of(built, seq).backward()  # also after it has been used and trained
    copied = how(built)
    assert torch.equal(copied(seq)[0], before)
    loss_of(copied, seq).backward()
    with torch.no_grad():
        for p in copied.parameters():
            p.fill_(torch.nan)
    assert torch.equal(built(seq)[0], before)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_state_dict_goes_round(name: str) -> None:
    one, other = memory(name), memory(name, seed=1)
    assert other.load_state_dict(one.state_dict(), strict=True).missing_keys == []
    assert torch.equal(one(tokens())[0], other(tokens())[0])
    nested = nn.ModuleDict({"block": nn.Sequential(memory(name, seed=2))})
    nested.load_state_dict({f"block.0.{key}": value for key, value in one.state_dict().items()})
    assert torch.equal(nested["block"][0](tokens())[0], one(tokens())[0])


@pytest.mark.parametrize("prefix", ["", "layers.0.memory."])
def test_the_second_copy_of_the_memory_in_published_checkpoints_is_ignored(prefix: str) -> None:
    one, other = memory(), memory(seed=1)
    published = {f"{prefix}{key}": value for key, value in one.state_dict().items()}
    for key, value in one.memory_model.state_dict().items():
        published[f"{prefix}memory_model.{key}"] = torch.full_like(value, torch.nan)
    keys = set(published)
    host = other if not prefix else nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"memory": other})])})
    host.load_state_dict(published, strict=True)
    assert torch.equal(one(tokens())[0], other(tokens())[0])
    assert set(published) == keys, "the checkpoint is left as it was"
    with pytest.raises(RuntimeError, match="Unexpected"):
        host.load_state_dict(published | {f"{prefix}memory_modell.x": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing"):
        host.load_state_dict({key: value for key, value in published.items() if "to_keys" not in key})


def test_safetensors_takes_the_state_dict_as_it_is(tmp_path: Path) -> None:
    """It refuses tensors that share storage."""
    one, other = memory("everything"), memory("everything", seed=1)
    save_file(one.state_dict(), tmp_path / "memory.safetensors")
    other.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    assert torch.equal(one(tokens())[0], other(tokens())[0])


def test_nothing_is_a_parameter_that_is_not_in_the_state_dict() -> None:
    built = memory("everything")
    assert dict(built.named_parameters()).keys() == built.state_dict().keys()
    assert not list(built.buffers())
    storages = [p.untyped_storage().data_ptr() for p in built.parameters()]
    assert len(set(storages)) == len(storages)
    assert all(p.is_contiguous() for p in built.parameters())


# training


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_parameter_gets_a_gradient(name: str) -> None:
    built = memory(name)
    loss_of(built, tokens()).backward()
    lazy = {key for key, p in built.named_parameters() if p.grad is None}
    assert not lazy
    idle = {key for key, p in built.named_parameters() if not p.grad.any()}
    assert not idle


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD foreach": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, foreach=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, foreach=False),
}


@pytest.mark.parametrize("how", OPTIMIZERS)
@pytest.mark.parametrize("name", ["heads", "everything"])
def test_optimizers_work_in_place(name: str, how: str) -> None:
    built, seq, target = memory(name), tokens(), tokens(seed=1)
    optimizer, losses = OPTIMIZERS[how](built.parameters()), []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (built(seq)[0] - target).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(built.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    heads = built.memory_model_parameters[1]
    assert not torch.equal(heads[0], heads[1]), "heads start equal and learn apart"


def test_a_state_survives_a_step_of_the_optimizer() -> None:
    """Truncated backpropagation: the parameters change in place between two pieces."""
    built = memory("everything")
    optimizer, state = torch.optim.Adam(built.parameters(), lr=1e-3), None
    for step in range(3):
        out, state = built(tokens(2, 11, 6, seed=step), state=state, detach_mem_state=True)
        kept = [w.clone() for w in state.states[0].values()]
        out.square().mean().backward()
        optimizer.step()
        assert all(map(torch.equal, kept, state.states[0].values()))


def test_it_learns_to_be_of_use() -> None:
    """Recall of a token that was seen much earlier: the loss of a model that cannot remember stays at 1."""
    torch.manual_seed(0)
    built = NeuralMemory(8, 2, batch_size=4, default_step_transform_max_lr=0.3)
    head = nn.Linear(8, 8)
    optimizer = torch.optim.Adam([*built.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(80):
        seq = torch.randn(16, 9, 8)
        answer = head(built(seq.repeat(1, 2, 1))[0][:, 9:-1])
        loss = (answer - seq[:, 1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(built.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


# modes of autograd


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_mode_of_autograd_gives_the_same_numbers(name: str) -> None:
    built, seq = memory(name).double(), tokens().double()
    expected, last = built(seq)
    more = tokens(2, 7, 6, seed=1).double()
    expected_more, _ = built(more, state=last)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            own = seq.clone()  # an inference tensor, inside inference mode
            for given in (own, seq):
                retrieved, state = built(given)
                assert_close(retrieved, expected.detach(), **EXACT)
                assert_close(built(more, state=state)[0], expected_more.detach(), **EXACT)
                assert_close(dict(state.updates), {k: w.detach() for k, w in last.updates.items()}, **EXACT)
        assert not retrieved.requires_grad


def test_a_module_made_in_inference_mode_can_be_used_there() -> None:
    with torch.inference_mode():
        built = memory("everything")
        assert built(tokens())[0].isfinite().all()


def test_training_after_inference_on_the_same_module() -> None:
    built = memory()
    with torch.inference_mode():
        built(tokens())
    loss_of(built, tokens()).backward()
    assert built.to_keys.weight.grad.any()


@pytest.mark.parametrize("name", ["heads", "everything", "spectral", "attention"])
def test_functional_call_and_grad_of_torch_func(name: str) -> None:
    built, seq = memory(name).double(), tokens().double()
    parameters = dict(built.named_parameters())

    def loss(parameters: dict[str, Tensor], seq: Tensor) -> Tensor:
        return torch.func.functional_call(built, parameters, (seq,))[0].square().mean()

    got = torch.func.grad(loss)({key: p.detach() for key, p in parameters.items()}, seq)
    loss_of(built, seq).backward()
    assert_close(got, {key: p.grad for key, p in parameters.items()}, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["plain", "heads"])
def test_vmap_of_torch_func(name: str) -> None:
    built, seqs = memory(name).double(), tokens(3, 2, 9, 6).double()
    got = torch.func.vmap(lambda seq: built(seq)[0])(seqs)
    assert_close(got, torch.stack([built(seq)[0] for seq in seqs]), **EXACT)


def test_gradcheck() -> None:
    built, seq = memory(default_step_transform_max_lr=0.1).double(), tokens(1, 5, 6).double().requires_grad_()
    names = ["to_keys.weight", "memory_model_parameters.1", "to_momentum.0.weight"]

    def answer(seq: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(built, dict(zip(names, values, strict=True)), (seq,))[0]

    values = [built.get_parameter(name).detach().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(answer, (seq, *values), fast_mode=True)


# compiling


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_equals_eager(name: str, backend: str) -> None:
    built, seq, more = memory(name), tokens(), tokens(2, 5, 6, seed=1)

    def step(seq: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        first, state = built(seq)
        second, _ = built(more, state=state)
        return first, second

    def run(step: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor]:
        built.zero_grad()
        outputs = step(seq, more)
        sum(out.square().sum() for out in outputs).backward()
        return [*(out.detach() for out in outputs), *(p.grad.clone() for p in built.parameters())]

    expected = run(step)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    assert_close(run(compiled), expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert_close(compiled(seq, more), step(seq, more), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["heads"])
def test_traces_into_one_graph(name: str) -> None:
    compiled_equals_eager(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["everything", "spectral", "attention", "general"])
def test_more_traces_into_one_graph(name: str) -> None:
    compiled_equals_eager(name, "aot_eager")


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["plain"])
def test_compiles_into_one_graph(name: str) -> None:
    compiled_equals_eager(name, "inductor")


# threads and processes


def threads_equal_one(times: int) -> None:
    built, seqs = memory("everything"), [tokens(2, 5 + n, 6, seed=n) for n in range(8)]
    expected = [built(seq)[0].detach() for seq in seqs]

    def work(offset: int) -> list[bool]:
        found = []
        for n in range(times):
            index = (n + offset) % len(seqs)
            with torch.set_grad_enabled(n % 2 == 0):
                found.append(torch.equal(built(seqs[index])[0].detach(), expected[index]))
        return found

    with ThreadPoolExecutor(4) as pool:
        results = [ok for found in pool.map(work, range(4)) for ok in found]
    assert len(results) == 4 * times
    assert all(results)


def test_threads_do_not_disturb_each_other() -> None:
    threads_equal_one(50)


@pytest.mark.slow
def test_threads_do_not_disturb_each_other_often() -> None:
    threads_equal_one(200)


def gradients(built: nn.Module) -> dict[str, Tensor]:
    return {key.removeprefix("module."): p.grad.clone() for key, p in built.named_parameters()}


def ddp_worker(rank: int, name: str, store: str, results: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    built = nn.parallel.DistributedDataParallel(memory(name), find_unused_parameters=False)
    for step in range(2):  # the second step raises where a parameter of the first got no gradient
        built.zero_grad()
        loss_of(built, tokens(4, 13, 6, seed=step)[2 * rank : 2 * rank + 2]).backward()
    if rank == 0:
        torch.save(gradients(built), results)
    torch.distributed.barrier()  # nobody leaves while the other still talks
    torch.distributed.destroy_process_group()


def fsdp_worker(rank: int, name: str, store: str, results: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    built = memory(name)
    fully_shard(built, mesh=init_device_mesh("cpu", (2,)))
    for step in range(2):
        built.zero_grad()
        loss_of(built, tokens(4, 13, 6, seed=step)[2 * rank : 2 * rank + 2]).backward()
    gathered = {key: p.grad.full_tensor() for key, p in built.named_parameters()}
    if rank == 0:
        torch.save(gathered, results)
    torch.distributed.barrier()  # nobody leaves while the other still talks
    torch.distributed.destroy_process_group()


def in_two_processes(worker: Callable[..., None], name: str) -> None:
    built = memory(name)
    loss_of(built, tokens(4, 13, 6, seed=1)).backward()
    with tempfile.TemporaryDirectory() as folder:
        files = (str(Path(folder, "store")), str(Path(folder, "results")))
        torch.multiprocessing.spawn(worker, args=(name, *files), nprocs=2)
        got = torch.load(files[1])
    assert_close(got, gradients(built), rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
def test_data_parallel_without_unused_parameters() -> None:
    in_two_processes(ddp_worker, "everything")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("name", ["plain", "heads"])
def test_fully_sharded(name: str) -> None:
    """Not with a gated transition: FSDP takes no parameter without axes."""
    in_two_processes(fsdp_worker, name)
