"""On a CUDA device everything is what it is on a CPU: `pytest -m cuda`.

Without one they are skipped. `TITANS_DEVICE=cpu pytest -m cuda` rehearses them: what can be tried on a CPU is, beside
itself.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.support.fake_graph import FakeGraphs
from tests.support.sequence_modules import READERS, Reader
from tests.support.streams import disturbed, pieces, randn
from tests.test_cuda_graphs import STREAMS, backbone, memory, stream_of, training_step
from tests.test_precisions import rms_error
from titans_pytorch import NeuralMemory, SegmentedAttention, TitansConfig, TitansMAG
from titans_pytorch.cuda_graphs import captured

DEVICE = torch.device(os.environ.get("TITANS_DEVICE", "cuda"))
IS_CUDA = DEVICE.type == "cuda"

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(IS_CUDA and not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"),
    pytest.mark.filterwarnings("default"),  # what kernels warn of differs from device to device
]
on_cuda_only = pytest.mark.skipif(not IS_CUDA, reason="a rehearsal on a CPU has no CUDA")

GRAPHS = None if IS_CUDA else FakeGraphs()
LOSSLESS = dict(rtol=1e-6, atol=1e-8)
STREAMING = [name for name, reader in READERS.items() if reader.stream is not None]
MODELS = [name for name, reader in READERS.items() if reader.reads == "ids"]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    """No TF32, in convolutions neither, where torch has it on."""
    before, precision = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before
    torch.set_float32_matmul_precision(precision)


def module_of(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The same module however often it is asked for, on the CPU."""
    return disturbed(READERS[name].made()).to(dtype)


def given_to(reader: Reader, dtype: torch.dtype, batch: int = 2, count: int = 13) -> Tensor:
    given = reader.given(batch, count)
    return given.to(dtype).requires_grad_() if given.is_floating_point() else given


def values_and_gradients(reader: Reader, module: nn.Module, given: Tensor) -> list[Tensor]:
    """Outputs, and the gradients of a random projection of them, on the CPU in float64."""
    given = given.detach().to(next(module.parameters()).device).requires_grad_(given.requires_grad)
    outputs = reader.outputs(module, given)
    (outputs * randn(*outputs.shape, seed=7).to(outputs)).sum().backward()
    wanted = [p for p in module.parameters() if p.requires_grad] + ([given] if given.requires_grad else [])
    return [each.detach().double().cpu() for each in (outputs, *(w.grad for w in wanted))]  # type: ignore[union-attr]


# ---- values and gradients


@pytest.mark.parametrize("name", READERS)
def test_float64_is_that_of_a_cpu(name: str) -> None:
    reader, given = READERS[name], given_to(READERS[name], torch.float64)
    expected = values_and_gradients(reader, module_of(name), given)
    assert_close(values_and_gradients(reader, module_of(name).to(DEVICE), given), expected, **LOSSLESS)


@pytest.mark.parametrize("name", READERS)
def test_float32_rounds_about_as_a_cpu_does(name: str) -> None:
    reader, given = READERS[name], given_to(READERS[name], torch.float64)
    module = module_of(name, torch.float32)
    exact = values_and_gradients(reader, copy.deepcopy(module).double(), given)
    given = given.detach().float().requires_grad_() if given.is_floating_point() else given
    on_cpu = values_and_gradients(reader, copy.deepcopy(module), given)
    found = values_and_gradients(reader, module.to(DEVICE), given)
    check_rounding(found, on_cpu, exact)


def check_rounding(found: list[Tensor], on_cpu: list[Tensor], exact: list[Tensor]) -> None:
    """Not much farther from what is exact than a CPU is; what is nearly zero is measured by what is not."""
    floor = 1e-2 * max(x.norm() for x in exact)
    for x, mine, its in zip(exact, found, on_cpu, strict=True):
        error, usual = ((each - x).norm() / x.norm().clamp(min=floor) for each in (mine, its))
        assert error < max(20 * usual, 1e-4)


LARGER: dict[str, dict[str, Any]] = {
    "renewed": dict(dim=64, chunk_size=8, batch_size=16),
    "never renewed": dict(dim=64, chunk_size=16),
    "4 heads": dict(dim=64, dim_head=16, heads=4, chunk_size=8, batch_size=32),
    "spectral norm": dict(dim=64, dim_head=16, heads=4, chunk_size=8, spectral_norm_surprises=True),
    "the paper's gates": dict(dim=64, chunk_size=16, per_parameter_gates=True, channelwise_decay=True),
}


def larger(name: str) -> NeuralMemory:
    torch.manual_seed(0)
    return NeuralMemory(**LARGER[name], default_step_transform_max_lr=0.02)


def answers(module: nn.Module, seq: Tensor, is_half: bool = False) -> list[Tensor]:
    """What a memory says, under autocast if it is to be half, and all gradients, on the CPU in float64."""
    like = next(module.parameters())
    with torch.autocast(like.device.type, torch.bfloat16, enabled=is_half):
        outputs, _ = module(seq.to(like))
    outputs.to(like.dtype).square().mean().backward()
    return [each.detach().double().cpu() for each in (outputs, *(p.grad for p in module.parameters()))]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", LARGER)
def test_memories_of_some_size(name: str) -> None:
    seq = randn(2, 500, 64)
    exact, on_cpu = answers(larger(name).double(), seq), answers(larger(name), seq)
    check_rounding(answers(larger(name).to(DEVICE), seq), on_cpu, exact)
    assert_close(answers(larger(name).double().to(DEVICE), seq), exact, **LOSSLESS)


@pytest.mark.parametrize("name", [name for name in LARGER if name != "spectral norm"])
def test_bfloat16_autocast(name: str) -> None:
    seq = randn(2, 100, 64)
    expected, got = answers(larger(name), seq), answers(larger(name).to(DEVICE), seq, is_half=True)
    assert rms_error(got[0], expected[0]) < 0.03
    assert all(each.isfinite().all() for each in got)


@pytest.mark.parametrize("name", MODELS)
def test_models_train_under_bfloat16_autocast(name: str) -> None:
    reader = READERS[name]
    model, ids = module_of(name, torch.float32).to(DEVICE), reader.given(2, 13).to(DEVICE)
    expected = model.loss(ids)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        loss = model.loss(ids)
    loss.backward()
    assert_close(loss, expected, rtol=0.1, atol=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# ---- streams


@pytest.mark.parametrize("name", STREAMING)
@torch.no_grad()
def test_pieces_are_the_whole(name: str) -> None:
    reader = READERS[name]
    module, given = module_of(name).to(DEVICE), given_to(reader, torch.float64, count=17).to(DEVICE)
    state, outputs = None, []
    for piece in pieces((5, 1, 1, 7, 3)):
        output, state = reader.stream(module, given[:, piece], state)  # type: ignore[misc]
        outputs.append(output)
    assert_close(torch.cat(outputs, dim=1), reader.outputs(module, given), **LOSSLESS)


@torch.no_grad()
def test_a_state_goes_on_on_another_device() -> None:
    built, seq = memory(batch_size=8), randn(2, 23, 8)
    expected, _ = built(seq)
    _, state = copy.deepcopy(built).to(DEVICE)(seq[:, :14].to(DEVICE))
    assert_close(built(seq[:, 14:], state=state.to("cpu"))[0], expected[:, 14:], **LOSSLESS)


@pytest.mark.parametrize("name", [name for name in MODELS if hasattr(READERS[name].kind, "sample")])
@torch.no_grad()
def test_sampling(name: str) -> None:
    model = module_of(name)
    prompt, greedy = READERS[name].given(2, 5), dict(use_cache=True, temperature=0.0, show_progress=False)
    expected = model.sample(prompt, 24, **greedy)
    model = model.to(DEVICE)
    assert torch.equal(model.sample(prompt.to(DEVICE), 24, **greedy).cpu(), expected)
    drawn = [
        model.sample(prompt.to(DEVICE), 24, use_cache=True, show_progress=False, generator=generator, stop_token=3)
        for generator in (torch.Generator(DEVICE).manual_seed(0), torch.Generator(DEVICE).manual_seed(0))
    ]
    assert torch.equal(*drawn)


# ---- no waiting for the device


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_cuda_only
@pytest.mark.parametrize("name", READERS)
def test_nothing_waits_for_the_device(name: str) -> None:
    """Neither a forward and a backward pass nor single tokens, whatever was kept of earlier calls."""
    reader = READERS[name]
    module, given = module_of(name, torch.float32).to(DEVICE), given_to(reader, torch.float32).to(DEVICE)
    torch.cuda.synchronize()
    with waiting_is_an_error():
        for _ in range(2):
            reader.outputs(module, given).square().sum().backward()
        state = None
        for token in given.detach().split(1, dim=1) if reader.stream else ():
            with torch.no_grad():
                _, state = reader.stream(module, token, state)  # type: ignore[misc]


@on_cuda_only
@torch.no_grad()
def test_waiting_would_be_noticed() -> None:
    with waiting_is_an_error(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=DEVICE).item()


# ---- kernels, compilers and graphs


@on_cuda_only
@pytest.mark.parametrize("sliding", [False, True])
def test_flex_attention_is_the_dense_one(sliding: bool) -> None:
    torch.manual_seed(0)
    attention = SegmentedAttention(
        64, 128, num_persist_mem_tokens=4, dim_head=32, heads=2, sliding=sliding, use_flex_attn=True
    ).to(DEVICE)
    nn.init.normal_(attention.persistent_memory)
    found = []
    for disabled in (True, False):
        attention.zero_grad()
        outputs, _ = attention(randn(2, 500, 64, dtype=torch.float32).to(DEVICE), disable_flex_attn=disabled)
        outputs.square().mean().backward()
        found.append([outputs.detach(), *(p.grad.clone() for p in attention.parameters())])  # type: ignore[union-attr]
    for dense, flex in zip(*found, strict=True):
        assert rms_error(flex, dense) < 1e-3


@on_cuda_only
def test_the_accelerated_scan_is_the_scan() -> None:
    pytest.importorskip("accelerated_scan")
    seq, found = randn(2, 128, 32, dtype=torch.float32).to(DEVICE), []
    for use in (False, True):
        torch.manual_seed(0)
        built = NeuralMemory(32, 4, engine="dense", use_accelerated_scan=use).to(DEVICE)
        outputs, _ = built(seq)
        outputs.square().mean().backward()
        found.append([outputs.detach(), *(p.grad for p in built.parameters())])
    for mine, its in zip(*found, strict=True):
        assert rms_error(its, mine) < 1e-3


def test_a_compiled_decode_step() -> None:
    torch._dynamo.reset()
    built = memory().float().to(DEVICE)
    tokens = randn(5, 2, 1, 8, dtype=torch.float32).to(DEVICE)
    compiled = torch.compile(lambda x, state: built(x, state=state), backend="inductor" if IS_CUDA else "aot_eager")
    with torch.no_grad():
        _, state = built(randn(2, 6, 8, dtype=torch.float32, seed=1).to(DEVICE))
        other = state
        for token in tokens:
            expected, state = built(token, state=state)
            got, other = compiled(token, other)
            assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def adam(module: nn.Module) -> torch.optim.Optimizer:
    if not IS_CUDA:
        return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)
    return torch.optim.AdamW(module.parameters(), lr=1e-3, capturable=True)


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "memory, renewed": lambda: memory(batch_size=8),
    "4 heads": lambda: memory(heads=4, dim_head=4),
    "spectral norm": lambda: memory(spectral_norm_surprises=True, default_step_transform_max_lr=0.05),
    **{variant: lambda v=variant: backbone(v) for variant in ("mac", "mag", "mal", "lmm")},
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_captured_training_step(name: str) -> None:
    one, other = TRAINED[name]().to(DEVICE), TRAINED[name]().to(DEVICE)
    draws = [(randn(2, 13, 8, seed=i).to(DEVICE), randn(2, 13, 8, seed=i + 50).to(DEVICE)) for i in range(5)]
    optimizer = adam(other)
    eager = training_step(one, adam(one))
    step = captured(training_step(other, optimizer), *draws[-1], changes=(other, optimizer), recorder=GRAPHS)
    for draw in draws:
        assert_close(step(*draw), eager(*draw).detach(), rtol=1e-6, atol=1e-9)
    assert_close(list(other.parameters()), list(one.parameters()), rtol=1e-5, atol=1e-7)


def test_a_captured_training_step_under_autocast() -> None:
    config = TitansConfig(dim=32, depth=2, heads=2, window=16, memory_chunk=4, memory_refresh=8)
    torch.manual_seed(0)
    one = TitansMAG(11, config).to(DEVICE)
    other = copy.deepcopy(one)
    optimizers = [adam(model) for model in (one, other)]

    def step_of(model: TitansMAG, optimizer: torch.optim.Optimizer) -> Callable[[Tensor], Tensor]:
        def step(ids: Tensor) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = model.loss(ids)
            loss.backward()
            optimizer.step()
            return loss

        return step

    ids = torch.randint(0, 11, (4, 2, 33), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    eager = step_of(one, optimizers[0])
    if not IS_CUDA:
        pytest.skip("on a CPU ids are looked at")
    step = captured(step_of(other, optimizers[1]), ids[0], changes=(other, optimizers[1]))
    losses = [(step(each), eager(each).detach()) for each in ids]
    for got, expected in losses:
        assert_close(got, expected, rtol=1e-2, atol=1e-2)
    assert any(before != after for before, after in pairwise(got for got, _ in losses))


@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_captured_decoding(name: str) -> None:
    build, period, num_before = STREAMS[name]
    module = build().to(DEVICE)
    _, state = module(randn(2, num_before + 16, 8, seed=99).to(DEVICE))
    decode = stream_of(module, state, period, GRAPHS)
    for seed in range(3 * period + 2):
        token = randn(2, 1, 8, seed=seed).to(DEVICE)
        expected, state = module(token, state=state)
        assert_close(decode(token), expected, **LOSSLESS)
    assert_close(decode.state.layers if hasattr(state, "layers") else decode.state.current,
                 state.layers if hasattr(state, "layers") else state.current, **LOSSLESS)  # fmt: skip


@torch.no_grad()
def test_what_depends_on_the_position_is_not_captured() -> None:
    module = backbone("mag").to(DEVICE)
    _, state = module(randn(2, 16, 8).to(DEVICE))
    decode = stream_of(module, state, 4, GRAPHS)
    for seed in range(4):
        decode(randn(2, 1, 8, seed=seed).to(DEVICE))
    with pytest.raises(ValueError, match="must do the same every period"):
        decode(randn(2, 1, 8, seed=4).to(DEVICE))
