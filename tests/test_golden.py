"""Golden vectors of the published package: every `nm_*` file, outputs, state and gradients, by every engine."""

from __future__ import annotations

import pytest
import torch

from tests.support import golden
from titans_pytorch import NeuralMemory


def engines_for(name: str) -> list[str]:
    return ["dense", "general"] if name == "nm_spectral" else ["factored", "dense", "general"]


CASES = [(name, engine) for name in golden.names("nm_") for engine in engines_for(name)]


@pytest.mark.filterwarnings("ignore:gated_transition")
@pytest.mark.parametrize("name, engine", CASES)
def test_equals_the_published_package(name: str, engine: str) -> None:
    file = golden.load(name)
    memory = NeuralMemory(**file.kwargs, engine=engine).double()
    memory.load_state_dict(file.state)
    seq = file.inputs["seq"].clone().requires_grad_()
    call = {key: file.call[key] for key in ("ttt_batch_size",) if key in file.call}
    if file.prev_state:
        kwargs = {key: value for key, value in file.kwargs.items() if key != "accept_weight_residual"}
        previous = NeuralMemory(**kwargs, engine=engine).double()
        previous.load_state_dict(file.prev_state)
        with torch.no_grad():
            call["prev_weights"] = previous(seq)[1].updates

    retrieved, state, (loss, rates) = memory(seq, return_surprises=True, **call)
    got = {"retrieved": retrieved, "unweighted_loss": loss, "adaptive_lr": rates}
    got |= {f"last_weights/{key}": weight for key, weight in state.states[0].items()}
    if "more" in file.inputs:
        got["more"] = memory(file.inputs["more"], state=state)[0]
    (retrieved * file.inputs["probe"]).sum().backward()
    grads = {key: p.grad for key, p in memory.named_parameters() if p.grad is not None} | {"in/seq": seq.grad}

    assert max(golden.output_errors(file, got).values()) < 1e-10
    assert max(golden.gradient_errors(file, grads).values()) < 1e-9
    assert grads.keys() == file.grads.keys()
