"""What is captured gives what it gives by itself; what cannot be captured is refused.

On the CPU graphs are those of `tests/support/fake_graph.py`; tests of the same on CUDA are in `test_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from tests.support.fake_graph import FakeGraphs
from tests.support.sequence_modules import DIM, READERS, config
from tests.support.streams import disturbed, randn
from titans_pytorch import NeuralMemory, TitansBackbone
from titans_pytorch.checks import tensor_checks
from titans_pytorch.cuda_graphs import CapturedStream, captured
from titans_pytorch.cuda_graphs.step import WARM_UPS
from titans_pytorch.memory.costs import COSTS, Costs

EXACT = dict(rtol=0, atol=0)


def training_step(module: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[Tensor, Tensor], Tensor]:
    def step(seq: Tensor, target: Tensor) -> Tensor:
        optimizer.zero_grad()
        outputs = module(seq)[0]
        loss = (outputs - target).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return step


def memory(seed: int = 0, **options: Any) -> NeuralMemory:
    torch.manual_seed(seed)
    return disturbed(NeuralMemory(**dict(dim=DIM, chunk_size=4, default_step_transform_max_lr=0.1) | options).double())


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def test_a_captured_training_step_trains_as_the_step_does() -> None:
    one, other = memory(), memory()
    examples = randn(2, 9, DIM, seed=100), randn(2, 9, DIM, seed=101)
    optimizer, graphs = sgd(other), FakeGraphs()
    eager = training_step(one, sgd(one))
    step = captured(training_step(other, optimizer), *examples, changes=(other, optimizer), recorder=graphs)
    for seed in range(4):
        given = randn(2, 9, DIM, seed=seed), randn(2, 9, DIM, seed=seed + 50)
        assert_close(step(*given), eager(*given).detach(), **EXACT)
    assert (graphs.num_warm_ups, graphs.num_graphs, graphs.num_replays) == (WARM_UPS, 1, 4)
    for mine, its in zip(other.parameters(), one.parameters(), strict=True):
        assert_close(mine, its, **EXACT)


def test_a_step_that_computes_spans_again_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COSTS, "cpu", Costs(span_tokens=8, kept_elements=0))
    module, seq = memory(), randn(2, 25, DIM)
    assert module.plan(2, 25).recomputes

    def step(seq: Tensor) -> list[Tensor]:
        module.zero_grad()
        module(seq)[0].square().sum().backward()
        return [p.grad for p in module.parameters() if p.grad is not None]

    replayed = captured(step, randn(2, 25, DIM, seed=1), changes=[module], recorder=FakeGraphs())
    assert_close(replayed(seq), step(seq), rtol=1e-9, atol=1e-9)


def test_capturing_changes_nothing_that_is_named() -> None:
    module = memory()
    optimizer = sgd(module)
    step = training_step(module, optimizer)
    examples = randn(2, 9, DIM), randn(2, 9, DIM, seed=1)
    step(*examples)
    before = [p.detach().clone() for p in module.parameters()]
    momenta = [state["momentum_buffer"].clone() for state in optimizer.state.values()]
    captured(step, *examples, changes=(module, optimizer), recorder=FakeGraphs())
    assert_close(list(module.parameters()), before, **EXACT)
    assert_close([state["momentum_buffer"] for state in optimizer.state.values()], momenta, **EXACT)


def test_results_are_copies_and_numbers_stay_what_they_were() -> None:
    scale = 2.0

    def step(x: Tensor) -> dict[str, Any]:
        return {"scaled": scale * x, "scale": scale}

    twice = captured(step, torch.ones(3), recorder=FakeGraphs())
    first = twice(torch.ones(3))
    scale = 3.0
    assert_close(twice(torch.full((3,), 5.0)), {"scaled": torch.full((3,), 10.0), "scale": 2.0}, **EXACT)
    assert_close(first["scaled"], torch.full((3,), 2.0), **EXACT)


@pytest.mark.parametrize("name", READERS)
def test_every_module_can_be_captured(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """None looks at a value or makes a tensor of numbers, forward or backward, but for ids, which only a CPU checks."""
    monkeypatch.setattr(tensor_checks, "check_ids", lambda *_: None)
    reader = READERS[name]
    module = disturbed(reader.made())
    given = reader.given(2, 13)

    def step(given: Tensor) -> list[Tensor]:
        module.zero_grad()
        outputs = reader.outputs(module, given)
        outputs.square().sum().backward()
        return [outputs, *(p.grad for p in module.parameters() if p.grad is not None)]

    replayed = captured(step, reader.given(2, 13, seed=1), changes=[module], recorder=FakeGraphs())
    got = replayed(given)
    assert_close(got, step(given), rtol=1e-6, atol=1e-7)


# a stream


STREAMS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "memory": (memory, 4, 0),
    "memory, renewed": (lambda: memory(batch_size=8), 8, 3),
    "memory, chunks of reading": (lambda: memory(chunk_size=(2, 4)), 4, 1),
    "memory with a convolution": (lambda: memory(conv_size=3, heads=2, dim_head=4), 4, 5),
    "LMM": (lambda: backbone("lmm"), 4, 2),
    "MAC": (lambda: backbone("mac"), 4, 5),
}
"""By name: a module, its period, how many tokens were read before"""


def backbone(variant: str) -> TitansBackbone:
    torch.manual_seed(0)
    return disturbed(TitansBackbone(variant, config()).double())


def stream_of(module: nn.Module, state: Any, period: int, graphs: FakeGraphs | None) -> CapturedStream[Any]:
    example = randn(2, 1, DIM).to(next(module.parameters()).device)
    return CapturedStream(lambda x, state: module(x, state=state), state, example, period=period, recorder=graphs)


@pytest.mark.parametrize("name", STREAMS)
@torch.no_grad()
def test_decoding(name: str) -> None:
    build, period, num_before = STREAMS[name]
    module, graphs = build(), FakeGraphs()
    _, state = module(randn(2, num_before + 16, DIM, seed=99))
    decode = CapturedStream(
        lambda x, state: module(x, state=state), state, randn(2, 1, DIM), period=period, recorder=graphs
    )
    for seed in range(3 * period + 2):
        token = randn(2, 1, DIM, seed=seed)
        expected, state = module(token, state=state)
        assert_close(decode(token), expected, rtol=1e-9, atol=1e-9)
        more = randn(2, 5, DIM, seed=seed + 1000)
        assert_close(module(more, state=decode.state)[0], module(more, state=state)[0], rtol=1e-9, atol=1e-9)
    assert (graphs.num_graphs, graphs.num_replays) == (period, 3 * period + 2)
    assert graphs.num_warm_ups == 2 * period


@pytest.mark.parametrize("variant", ["mag", "mal"])
@torch.no_grad()
def test_attention_that_turns_with_the_position_is_refused(variant: str) -> None:
    module = backbone(variant)
    _, state = module(randn(2, 16, DIM))
    decode = stream_of(module, state, 4, FakeGraphs())
    for seed in range(4):
        decode(randn(2, 1, DIM, seed=seed))
    with pytest.raises(ValueError, match="must do the same every period of 4 calls"):
        decode(randn(2, 1, DIM, seed=4))


@pytest.mark.parametrize(
    "period, match",
    [
        (3, r"of the same shapes after a period of 3 calls, got one where \(2, 0, 8\) became \(2, 3, 8\)"),
        (4, "must do the same every period of 4 calls, got another answer than the step itself on call 8"),
    ],
)
@torch.no_grad()
def test_what_is_no_period_is_refused(period: int, match: str) -> None:
    module = memory(batch_size=8)
    decode = stream_of(module, module(randn(2, 16, DIM))[1], period, FakeGraphs())

    def steps() -> None:
        for seed in range(2 * period):
            decode(randn(2, 1, DIM, seed=seed))

    with pytest.raises(ValueError, match=match):
        steps()


# errors


def double(x: Tensor) -> Tensor:
    return 2 * x


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no CUDA device")
def test_without_cuda() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device, got a machine without one"):
        captured(double, torch.ones(2))
    with pytest.raises(ValueError, match="needs a CUDA device, got a machine without one"):
        CapturedStream(lambda x, state: (x, state), (), torch.ones(2), period=1)


@pytest.mark.parametrize(
    "given, kind, match",
    [
        ((), ValueError, r"must be given 1 tensor\(s\), got 0"),
        ((torch.ones(2), torch.ones(2)), ValueError, r"must be given 1 tensor\(s\), got 2"),
        ((torch.ones(3),), ValueError, r"argument 0 must be like its example, \(2,\) of torch.float32, got \(3,\) of"),
        ((torch.ones(2).double(),), ValueError, "of torch.float32, got .* of torch.float64"),
        ((1.0,), TypeError, "argument 0 must be a tensor, got float"),
        ((torch.ones(2, requires_grad=True),), ValueError, "argument 0 must not require a gradient"),
    ],
)
def test_what_a_captured_step_is_given(given: tuple[Any, ...], kind: type[Exception], match: str) -> None:
    replayed = captured(double, torch.ones(2), recorder=FakeGraphs())
    with pytest.raises(kind, match=match):
        replayed(*given)


def test_examples_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="example 0 must be on a CUDA device, got one on cpu"):
        captured(double, torch.ones(2))


def test_what_cannot_be_captured() -> None:
    with pytest.raises(ValueError, match="at least one example tensor, got none"):
        captured(lambda: torch.ones(2))
    with pytest.raises(TypeError, match="example 0 must be a tensor, got list"):
        captured(double, [1.0], recorder=FakeGraphs())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="changes must be modules and optimizers, got dict"):
        captured(double, torch.ones(2), changes=[{}], recorder=FakeGraphs())  # type: ignore[list-item]
    adam = torch.optim.Adam(nn.Linear(2, 2).parameters())
    with pytest.raises(ValueError, match="capturable=True to be captured, got Adam with False"):
        captured(double, torch.ones(2), changes=[adam], recorder=FakeGraphs())
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match="must enter autocast itself, got autocast around"),
    ):
        captured(double, torch.ones(2), recorder=FakeGraphs())


@pytest.mark.parametrize(
    "step", [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0, 2.0])]
)
def test_what_a_graph_refuses_its_fake_refuses(step: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(RuntimeError, match="not permitted"):
        captured(step, torch.ones(2), recorder=FakeGraphs())
